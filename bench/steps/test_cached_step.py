"""A training step that begins at the first layer whose prefix is trained, from activations that an earlier epoch kept,
beside the whole step, a step that trains the prefix of every layer, and the bare model's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from bench import models
from bench.conftest import Measure
from bench.models import SMALL, SMOLLM2_REAL, TINY, Shape
from bench.scale import SCALE, pick
from bench.steps.cached import check, upper
from bench.steps.contenders import MAKERS
from bench.steps.packed import SHORTEST, Data, demo_data, ragged

# Rows, the longest of them, and the share of the layers that lie below those trained.
CASES = pick(
    smoke=[(TINY[0], 3, 40, 0.5), (TINY[2], 3, 40, 0.5)],
    quick=[(SMALL[0], 4, 256, 0.5)],
    full=[*((shape, 4, 256, 0.5) for shape in SMALL), *((SMOLLM2_REAL, 4, 256, share) for share in (0.25, 0.5, 0.75))],
)
DEMO = pick(smoke=[0.5], quick=[0.5], full=[0.25, 0.5, 0.75])
VIRTUAL = 4 if SCALE == "smoke" else 20


@pytest.mark.parametrize(("shape", "rows", "longest", "share"), CASES, ids=lambda x: getattr(x, "name", str(x)))
def test_ragged_lengths(
    measure: Measure, leave_out: Callable[..., Any], shape: Shape, rows: int, longest: int, share: float
) -> None:
    """Drawn log-uniformly; the last fifth of each example carries labels."""
    data = ragged(shape.vocabulary, rows, longest, VIRTUAL)
    compare(measure, leave_out, shape, data, f"lengths of {SHORTEST} to {longest}", share)


@pytest.mark.parametrize("share", DEMO)
def test_the_demo(measure: Measure, leave_out: Callable[..., Any], share: float) -> None:
    """A batch of countries and capitals on the demo's model."""
    if SCALE == "smoke":
        pytest.skip("a smoke run has no time for a real model")
    if reason := models.missing(SMOLLM2_REAL):
        leave_out("cached step", {"model": SMOLLM2_REAL.name, "data": "the demo", "below": share}, reason)
    compare(measure, leave_out, SMOLLM2_REAL, demo_data(), "the demo", share)


def compare(measure: Measure, leave_out: Callable[..., Any], shape: Shape, data: Data, name: str, share: float) -> None:
    case = data.case(shape.name, name, "prefix")
    first = int(share * shape.layers)
    case.update(first=first, layers=shape.layers)
    if reason := models.missing(shape):
        leave_out("cached step", case, reason)
    model = models.make(shape, positions=case["T"] + data.virtual)
    with ExitStack() as stack:
        found = upper(stack, model, data, first)
        error = check(found)
        measure(
            "cached step",
            case,
            found.kept(),
            {
                "bare model": MAKERS["bare model"](model, data.padded(), data.virtual).step,
                "without a cache": found.whole(),
                "every layer trained": MAKERS["prefixcore prefix"](model, data.packed(), data.virtual).step,
            },
            relative_error=error,
        )
