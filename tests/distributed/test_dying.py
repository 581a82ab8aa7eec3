"""A process dies, or Ctrl-C comes: the others end, and the adapter on the disk is a whole one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

import prefixcore
from tests import tiny
from tests.distributed import launch

LAST_SECONDS = 60.0
"""How long the others may live on."""


def wait_for(path: Path, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} has not come"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("how", "number", "victim"),
    [
        pytest.param("ddp", signal.SIGKILL, 1, id="one is killed"),
        pytest.param("fsdp", signal.SIGKILL, 0, id="the writer is killed", marks=pytest.mark.slow),
        pytest.param("pipeline", signal.SIGKILL, 1, id="a stage is killed", marks=pytest.mark.slow),
        pytest.param("ddp", signal.SIGINT, None, id="ctrl-c", marks=pytest.mark.slow),
    ],
)
def test_the_others_end_and_the_adapter_is_whole(
    how: str, number: signal.Signals, victim: int | None, tmp_path: Path
) -> None:
    process = launch.start(launch.command("dying", tmp_path, how))
    try:
        for rank in (0, 1):
            wait_for(tmp_path / f"pid-{rank}")
        wait_for(tmp_path / "adapter")
        pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1)]
        time.sleep(0.5)
        assert process.poll() is None
        began = time.monotonic()
        os.kill(process.pid if victim is None else pids[victim], number)
        output, _ = process.communicate(timeout=LAST_SECONDS + 30)
        assert time.monotonic() - began < LAST_SECONDS
        assert process.returncode != 0, output
        assert not any(is_running(pid) for pid in pids)
    finally:
        launch.end(process)
    with prefixcore.load(tiny.model(), tmp_path / "adapter") as handle:
        assert handle.num_virtual_tokens == 4
        handle.save(tmp_path / "adapter")  # which clears away what a dead writer has left
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "pid-0", "pid-1"}
