"""Runs a module of the tests in several processes, as `torchrun` does, on this machine's CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
SECONDS = 240
"""How long a run may take on a machine that has other work."""


def command(module: str, *arguments: str | Path, processes: int = 2) -> list[str]:
    """The command line of a run, on a port that is free."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, "-m", f"tests.distributed.{module}", *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    """Of a run: one thread a process, no network, no GPU."""
    here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **here, **changes}


def start(line: list[str], **changes: str) -> subprocess.Popen[str]:
    """Starts a command in a session of its own, so that `end` reaches all that it starts."""
    return subprocess.Popen(
        line, env=environment(**changes), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> None:
    """Ends a command and what it has started, if they still run."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(module: str, folder: Path, *arguments: str | Path, processes: int = 2) -> list[Mapping[str, Any]]:
    """Runs a module, and returns what each process has put into `folder` by `report`."""
    process = start(command(module, folder, *arguments, processes=processes))
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        end(process)
    assert process.returncode == 0, output
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(processes)]


def report(folder: str, rank: int, found: Mapping[str, Any]) -> None:
    """Leaves what a process has found for the test."""
    torch.save(dict(found), Path(folder) / f"rank-{rank}.pt")


def leave() -> None:
    """Ends a process's part in the group, when all have come here.

    gloo's threads let go of Python's tensors a moment after a collective has returned. A group that is destroyed within
    that moment waits for its thread while it holds the interpreter's lock, for which that thread waits: for ever. The
    barrier lets the thread through.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
