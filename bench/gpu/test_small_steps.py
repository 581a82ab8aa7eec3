"""Whole steps of SmolLM2-135M's shape on the wall, where launching is most of it: beside the bare frozen model, PEFT's
prefix tuning and LoRA of rank 8."""

from __future__ import annotations

import pytest

from bench.scale import pick

from . import clock
from .conftest import Measure
from .steps import BARE, LORA, OURS, PEFT, SMALL, SMALL_VIRTUAL, batch_of, checked, contenders, free, frozen

SIZES = [(8, 64), (8, 512), (2, 2048)]


@pytest.mark.parametrize(("rows", "length"), pick(smoke=[(1, 5)], quick=SIZES, full=SIZES))
def test_small_step(measure: Measure, rows: int, length: int) -> None:
    error = checked(SMALL, rows, length, SMALL_VIRTUAL)
    batch = batch_of(SMALL, rows, length)
    found = contenders([OURS, BARE, PEFT, LORA], frozen(SMALL, 4096), batch, SMALL_VIRTUAL)
    calls = {name: contender.step for name, contender in found.items()}
    measure(
        "gpu small step",
        {"model": SMALL.name, "B": rows, "T": length, "P": SMALL_VIRTUAL},
        calls.pop(OURS),
        calls,
        seconds=clock.wall_seconds,
        relative_error=error,
    )
    del found, calls
    free()
