"""A whole training step on ragged data: our prefix on a packed batch, beside our own and PEFT's on the padded one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench import models
from bench.conftest import Measure
from bench.models import SMALL, SMOLLM2_REAL, TINY, Shape
from bench.scale import SCALE, pick
from bench.steps.contenders import MAKERS
from bench.steps.packed import SHORTEST, Data, check, demo_data, ragged

CASES = pick(
    smoke=[(TINY[0], 3), (TINY[1], 1)],
    quick=[(SMALL[0], 4)],
    full=[(SMALL[0], 8), (SMALL[1], 8), (SMALL[2], 8), (SMOLLM2_REAL, 4)],
)
LONGEST, VIRTUAL = (40, 4) if SCALE == "smoke" else (1024, 64)


@pytest.mark.parametrize(("shape", "rows"), CASES, ids=lambda x: getattr(x, "name", str(x)))
def test_ragged_lengths(measure: Measure, leave_out: Callable[..., Any], shape: Shape, rows: int) -> None:
    """Drawn log-uniformly; the last fifth of each example carries labels."""
    data = ragged(shape.vocabulary, rows, LONGEST, VIRTUAL)
    name = f"lengths of {SHORTEST} to {LONGEST}"
    if reason := models.missing(shape):
        leave_out("packed step", data.case(shape.name, name), reason)
    compare(measure, shape, data, name)


def test_the_demo(measure: Measure, leave_out: Callable[..., Any]) -> None:
    """A batch of countries and capitals on the demo's model: rows of a few tokens, and not ragged at that."""
    if reason := models.missing(SMOLLM2_REAL):
        leave_out("packed step", {"model": SMOLLM2_REAL.name, "data": "the demo"}, reason)
    if SCALE == "smoke":
        pytest.skip("a smoke run has no time for a real model")
    compare(measure, SMOLLM2_REAL, demo_data(), "the demo")


def compare(measure: Measure, shape: Shape, data: Data, name: str) -> None:
    model = models.make(shape, positions=LONGEST + VIRTUAL)
    error = check(model, data)
    references = ["PEFT prefix"] if SCALE == "quick" else ["PEFT prefix", "bare model"]
    measure(
        "packed step",
        data.case(shape.name, name),
        MAKERS["prefixcore prefix"](model, data.packed(), data.virtual).step,
        {
            "padded": MAKERS["prefixcore prefix"](model, data.padded(), data.virtual).step,
            **{who: MAKERS[who](model, data.padded(), data.virtual).step for who in references},
        },
        relative_error=error,
    )
