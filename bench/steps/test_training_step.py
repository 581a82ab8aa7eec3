"""A whole training step (forward, backward, optimizer) with a prefix or a soft prompt, beside the bare frozen model,
PEFT's prefix, prompt and Cartridge tuning, and LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from bench import models
from bench.conftest import Measure
from bench.models import LARGE, SMALL, SMOLLM2_REAL, TINY
from bench.scale import SCALE, pick
from bench.steps.check import check_step
from bench.steps.contenders import MAKERS, Step
from prefixcore.backends import library

CASES = pick(
    smoke=[
        *(Step(shape, 2, 9, 4) for shape in TINY),
        Step(TINY[0], 3, 9, 4, ragged=True),
        Step(TINY[1], 2, 9, 4, dtype="bf16", brief=True),
    ],
    quick=[
        Step(SMALL[0], 1, 1024, 64, brief=True),
        Step(SMALL[0], 1, 128, 20, dtype="bf16", brief=True),
        Step(SMALL[1], 1, 128, 20),
        Step(SMALL[2], 1, 128, 20),
    ],
    full=[
        *(Step(shape, 1, 1024, 64) for shape in SMALL),
        *(Step(shape, 1, 1024, 64, dtype="bf16", brief=True) for shape in SMALL),
        *(Step(shape, 4, 128, 20) for shape in SMALL),
        Step(SMALL[0], 8, 8, 20),
        Step(SMALL[0], 8, 1024, 64, ragged=True, brief=True),
        Step(SMOLLM2_REAL, 1, 1024, 64),
        Step(SMOLLM2_REAL, 1, 1024, 64, dtype="bf16", brief=True),
        Step(SMOLLM2_REAL, 1, 128, 20),
        Step(SMOLLM2_REAL, 8, 8, 20),
        *(Step(shape, 1, length, 64, brief=True) for shape in LARGE for length in (1024, 128)),
        *(Step(LARGE[0], 1, length, 64, dtype="bf16", brief=True) for length in (1024, 128)),
    ],
)
BRIEF = ["bare model", "PEFT prefix"]
REFERENCES = [*BRIEF, "PEFT prompt", "LoRA"]
MORE = [] if SCALE == "quick" else ["PEFT Cartridge", "LoRA, all linear"]


def too_slow(case: Step) -> str | None:
    """Why such a step is not measured here, if it is not: PyTorch takes seconds for each, and there are dozens."""
    if case.dtype == "bf16" and SCALE != "smoke" and library.host().isa() in ("baseline", "avx2"):
        return "PyTorch's products in bfloat16 take minutes a model on a CPU without AVX-512"
    return None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_step(measure: Measure, leave_out: Callable[..., Any], case: Step) -> None:
    """The candidate is our prefix; our soft prompt runs in turn with it, as one more of the others."""
    if reason := models.missing(case.shape) or too_slow(case):
        leave_out("step", case.case(), reason)
    error = check_step(case)
    model, batch = case.model(), case.batch()
    names = ["prefixcore prefix", *(BRIEF if case.brief else ["prefixcore prompt", *REFERENCES, *MORE])]
    contenders = {name: MAKERS[name](model, batch, case.P) for name in names}
    steps = {name: contender.step for name, contender in contenders.items()}
    measure(
        "step",
        case.case(),
        steps.pop("prefixcore prefix"),
        steps,
        relative_error=error,
        trained={name: contender.trained for name, contender in contenders.items()},
    )


LAYERS = pick(smoke=[1, 2], quick=[2, 8], full=[1, 2, 4, 8, 16, 32])


@pytest.mark.parametrize("layers", LAYERS)
def test_number_of_layers(measure: Measure, layers: int) -> None:
    """How a step's cost grows with the number of layers."""
    base, length, virtual = (TINY[0], 9, 4) if SCALE == "smoke" else (SMALL[0], 256, 32)
    case = Step(replace(base, layers=layers), 1, length, virtual, brief=True)
    error = check_step(case)
    model, batch = case.model(), case.batch()
    steps = {name: MAKERS[name](model, batch, virtual).step for name in ["prefixcore prefix", *BRIEF]}
    measure(
        "layers",
        case.case(axis="layers", value=layers),
        steps.pop("prefixcore prefix"),
        steps,
        relative_error=error,
    )
