"""`make gpu` where there is no GPU, and how it shares out the tests."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.device import shard

ROOT = Path(__file__).resolve().parents[3]


def test_without_a_gpu_it_says_so_and_fails(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / ".ci" / "gpu.py", "--out", tmp_path / "out"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # the GPU of the machine, if there is one
    result = subprocess.run(command, capture_output=True, text=True, env=hidden)
    assert result.returncode == 1
    assert "finds no NVIDIA GPU here, so nothing was run" in result.stderr
    assert not (tmp_path / "out").exists()
    result = subprocess.run([*command, "--wheels", tmp_path / "none"], capture_output=True, text=True, env=hidden)
    assert result.returncode == 1
    assert "is not a folder" in result.stderr


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prefixcore_gpu_script", ROOT / ".ci" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_was_found_is_on_disk_after_every_step(script: ModuleType, tmp_path: Path) -> None:
    session = script.Session(tmp_path, False, {"cores": 2})
    (tmp_path / "one-0.xml").write_text("<testsuites><testsuite")  # of a process that was killed
    assert session.run("one", [["true"], ["true"]], 60)
    assert not session.run("two", [["false"]], 60)
    session.began -= script.LIMIT
    assert not session.run("three", [["true"]], 60)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [step["state"] for step in found["steps"]] == ["passed", "failed", "not run"]
    assert not found["finished"]
    assert not found["passed"]


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_what_runs_too_long_is_stopped_with_all_that_it_started(script: ModuleType, tmp_path: Path) -> None:
    began = time.monotonic()
    slow = subprocess.Popen(["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/child; wait"], start_new_session=True)
    quick = subprocess.Popen(["true"], start_new_session=True)
    assert script.wait_for([slow, quick], began + 0.5) == ["stopped: no time was left", 0]
    assert time.monotonic() - began < 30
    child = int((tmp_path / "child").read_text())
    while is_alive(child):
        assert time.monotonic() - began < 30
        time.sleep(0.1)


def test_versions_that_are_too_old_count_as_missing(script: ModuleType) -> None:
    assert script.missing({"pytest": "pytest>=8", "torch": "torch>=2.10"}) == []
    assert script.missing({"pytest": "pytest>=1000", "no_such": "no-such>=1"}) == ["no-such>=1", "pytest>=1000"]


def test_every_test_is_in_one_share(request: pytest.FixtureRequest) -> None:
    items = request.session.items
    shares = [shard(items, f"{index}/3") for index in range(3)]
    assert sorted(item.nodeid for share in shares for item in share) == sorted(item.nodeid for item in items)
