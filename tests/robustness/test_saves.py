"""A save that dies or is interrupted at any moment leaves the old adapter or the new one, with its own record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("how", ["die", "interrupt", "random"])
def test_an_adapter_is_always_old_or_new(how: str, exchange: bool, every: int) -> None:
    command = [sys.executable, "-m", "tests.robustness.saves", how, "--every", str(every)]
    done = subprocess.run(
        [*command, *([] if exchange else ["--no-exchange"])], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failures"] == []
    assert result["tried"] >= 150 // every


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_readers_and_two_writers_at_once(exchange: bool) -> None:
    """No error and no mixture: each reader finds one writer's adapter with its own record."""
    command = [sys.executable, "-m", "tests.robustness.crowd", "4", *([] if exchange else ["--no-exchange"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failures"] == []
    assert min(result["counts"].values()) >= 10, result["counts"]
