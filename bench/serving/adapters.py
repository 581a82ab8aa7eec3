"""The demo's registry: each task trained by `prefixcore train`, and added to one folder."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.demo.base_model import DemoError
from prefixcore.adapters import Registry

from .tasks import Task, write

STEPS = "60"


def train(model: Path, tasks: Sequence[Task], out: Path, announce: Callable[[str], None]) -> Path:
    """A registry under `out` with an adapter a task; what is there already is not trained again."""
    folder = out / "adapters"
    there = {entry.name for entry in Registry(folder).entries() if not entry.problem} if folder.is_dir() else set()
    for task in tasks:
        if task.name in there:
            announce(f"{task.name}: trained before, in {folder / task.name}")
            continue
        announce(f"{task.name}: {STEPS} steps of `prefixcore train`, then `prefixcore add`")
        training, held_out = task.split()
        work = out / "training" / task.name
        work.mkdir(parents=True, exist_ok=True)
        run(
            *("train", "--model", model, "--method", "prefix", "--init-text", task.text, "--task", task.says),
            *("--data", write(training, work / "data.jsonl"), "--eval-data", write(held_out, work / "held-out.jsonl")),
            *("--license", "CC-BY-4.0", "--intended-use", "a demonstration; the answers are a small model's"),
            *("--steps", STEPS, "--end", r"\n", "--out", work / "adapter"),
        )
        run("add", work / "adapter", folder, "--name", task.name)
    return folder


def run(*arguments: str | Path) -> None:
    """A command of `prefixcore`, as a person would type it; its output goes to ours.

    Raises:
        DemoError: it fails.
    """
    if code := status(*arguments):
        raise DemoError(
            f"`prefixcore {shlex.join(map(str, arguments))}` ended with exit code {code}; it says why above"
        )


def status(*arguments: str | Path) -> int:
    """The same; its exit code."""
    return subprocess.run(_command(arguments), stdin=subprocess.DEVNULL).returncode


def said(*arguments: str | Path) -> tuple[int, str]:
    """The same; its exit code, and its results, which are not printed."""
    done = subprocess.run(_command(arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    return done.returncode, done.stdout.rstrip()


def _command(arguments: Sequence[str | Path]) -> list[str]:
    return [sys.executable, "-m", "prefixcore", *map(str, arguments)]
