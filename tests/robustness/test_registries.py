"""A registry whose writers die at any moment, or write at once, holds whole adapters and knows what it replaced."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def _run(*arguments: str) -> Any:
    command = [sys.executable, "-m", "tests.robustness.registries", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failures"] == []
    return result


@pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_a_writer_that_dies_leaves_the_old_one_or_the_new(every: int) -> None:
    assert _run("die", "--every", str(every))["tried"] >= 300 // every


def test_two_writers_at_once() -> None:
    result = _run("crowd", "--seconds", "2")
    assert min(result["counts"].values()) >= 5, result["counts"]
    assert result["replaced"] >= 5
