"""Peak resident memory of training steps, each way of training in a fresh process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import models
from bench.memory.peak import can_measure, in_fresh_process
from bench.scale import SCALE, pick
from bench.steps.check import check_step
from bench.steps.contenders import Step
from bench.steps.test_training_step import MORE, REFERENCES

CASES = pick(
    smoke=[(models.TINY[0], 1, 9, 4)],
    quick=[(models.SMALL[0], 1, 1024, 64)],
    full=[(models.SMALL[0], 1, 1024, 64), (models.SMOLLM2_135M, 1, 1024, 64)],
)
NAMES = {
    "smoke": ["prefixcore prefix", "bare model"],
    "quick": ["prefixcore prefix", "bare model", "PEFT prefix"],
    "full": ["prefixcore prefix", "prefixcore prompt", *REFERENCES, *MORE],
}[SCALE]
REPEATS = {"smoke": 1, "quick": 1, "full": 3}[SCALE]


@pytest.mark.skipif(not can_measure(), reason="the high-water mark of resident memory can be reset on Linux only")
@pytest.mark.parametrize(("shape", "rows", "length", "virtual"), CASES, ids=lambda x: getattr(x, "name", str(x)))
def test_peak(note: Callable[..., None], shape: models.Shape, rows: int, length: int, virtual: int) -> None:
    error = check_step(Step(shape, rows, length, virtual, brief=SCALE == "quick"))
    case = {"shape": vars(shape), "B": rows, "T": length, "P": virtual}
    peaks: dict[str, list[int]] = {name: [] for name in NAMES}
    state: dict[str, int] = {}
    for _ in range(REPEATS):
        for name in NAMES:
            figures = in_fresh_process({**case, "contender": name})
            peaks[name].append(figures["peak"] - figures["before"])
            state[name] = figures["state"]
    note(
        "peak memory",
        {"model": shape.name, "B": rows, "T": length, "P": virtual},
        lambda: None,
        relative_error=error,
        bytes_above_start=peaks,
        state_bytes=state,
    )
