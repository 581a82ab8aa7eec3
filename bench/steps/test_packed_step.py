"""A whole training step on ragged data: our prefix, or soft prompt, on a packed batch, beside our own and PEFT's on the
padded one."""

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

# Rows, and the longest of them.
CASES = pick(
    smoke=[(TINY[0], 3, 40, "prefix"), (TINY[1], 1, 40, "prefix"), (TINY[0], 3, 40, "prompt")],
    quick=[(SMALL[0], 4, 1024, "prefix")],  # and the demo's prompt
    full=[
        *((shape, 8, 1024, kind) for shape in SMALL for kind in ("prefix", "prompt")),
        (SMALL[0], 8, 128, "prompt"),
        *((SMOLLM2_REAL, 4, 1024, kind) for kind in ("prefix", "prompt")),
    ],
)
VIRTUAL = 4 if SCALE == "smoke" else 64


@pytest.mark.parametrize(("shape", "rows", "longest", "kind"), CASES, ids=lambda x: getattr(x, "name", str(x)))
def test_ragged_lengths(
    measure: Measure, leave_out: Callable[..., Any], shape: Shape, rows: int, longest: int, kind: str
) -> None:
    """Drawn log-uniformly; the last fifth of each example carries labels."""
    data = ragged(shape.vocabulary, rows, longest, VIRTUAL)
    name = f"lengths of {SHORTEST} to {longest}"
    if reason := models.missing(shape):
        leave_out("packed step", data.case(shape.name, name, kind), reason)
    compare(measure, shape, data, name, kind)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_the_demo(measure: Measure, leave_out: Callable[..., Any], kind: str) -> None:
    """A batch of countries and capitals on the demo's model: rows of a few tokens, and not ragged at that."""
    if reason := models.missing(SMOLLM2_REAL):
        leave_out("packed step", {"model": SMOLLM2_REAL.name, "data": "the demo", "kind": kind}, reason)
    if SCALE == "smoke":
        pytest.skip("a smoke run has no time for a real model")
    compare(measure, SMOLLM2_REAL, demo_data(), "the demo", kind)


def compare(measure: Measure, shape: Shape, data: Data, name: str, kind: str) -> None:
    case = data.case(shape.name, name, kind)
    model = models.make(shape, positions=case["T"] + data.virtual)
    error = check(model, data, kind)
    references = [f"PEFT {kind}"] if SCALE == "quick" else [f"PEFT {kind}", "bare model"]
    measure(
        "packed step",
        case,
        MAKERS[f"prefixcore {kind}"](model, data.packed(), data.virtual).step,
        {
            "padded": MAKERS[f"prefixcore {kind}"](model, data.padded(), data.virtual).step,
            **{who: MAKERS[who](model, data.padded(), data.virtual).step for who in references},
        },
        relative_error=error,
    )
