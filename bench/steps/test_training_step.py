"""A whole training step (forward, backward, optimizer) with a prefix or a soft prompt, beside the bare frozen model,
PEFT's prefix, prompt and Cartridge tuning, and LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from bench import models
from bench.conftest import Measure
from bench.models import SMALL, SMOLLM2_135M, TINY, Shape
from bench.scale import SCALE, pick
from bench.steps.contenders import MAKERS, check


@dataclass(frozen=True)
class Step:
    shape: Shape
    B: int
    T: int
    P: int
    ragged: bool = False  # padded rows of many lengths


CASES = pick(
    smoke=[*(Step(shape, 2, 9, 4) for shape in TINY), Step(TINY[0], 3, 9, 4, ragged=True)],
    quick=[Step(SMALL[0], 1, 1024, 64), Step(SMALL[1], 2, 128, 20), Step(SMALL[2], 2, 128, 20)],
    full=[
        *(Step(shape, 1, 1024, 64) for shape in SMALL),
        *(Step(shape, 4, 128, 20) for shape in SMALL),
        Step(SMALL[0], 8, 8, 20),
        Step(SMALL[0], 8, 1024, 64, ragged=True),
        Step(SMOLLM2_135M, 1, 1024, 64),
        Step(SMOLLM2_135M, 8, 8, 20),
    ],
)
REFERENCES = ["bare model", "PEFT prefix", "PEFT prompt", "LoRA"]
MORE = [] if SCALE == "quick" else ["PEFT Cartridge", "LoRA, all linear"]


def name(case: Any) -> str | None:
    if not isinstance(case, Step):
        return None
    return f"{case.shape.name}-{case.B}-{case.T}-{case.P}" + "-ragged" * case.ragged


@pytest.mark.parametrize("case", CASES, ids=name)
def test_training_step(measure: Measure, case: Step) -> None:
    """The candidate is our prefix; our soft prompt runs in turn with it, as one more of the others."""
    model = models.make(case.shape, positions=case.T + case.P)
    batch = models.batch(case.shape, case.B, case.T, ragged=case.ragged)
    error = check(model, batch, case.P)
    names = ["prefixcore prefix", "prefixcore prompt", *REFERENCES, *MORE]
    contenders = {name: MAKERS[name](model, batch, case.P) for name in names}
    steps = {name: contender.step for name, contender in contenders.items()}
    measure(
        "step",
        {"model": case.shape.name, "B": case.B, "T": case.T, "P": case.P, "ragged": case.ragged},
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
    shape = Shape(**{**vars(base), "layers": layers})
    model = models.make(shape, positions=length + virtual)
    batch = models.batch(shape, 1, length)
    error = check(model, batch, virtual)
    steps = {n: MAKERS[n](model, batch, virtual).step for n in ("prefixcore prefix", "bare model", "PEFT prefix")}
    measure(
        "layers",
        {"model": shape.name, "B": 1, "T": length, "P": virtual, "axis": "layers", "value": layers},
        steps.pop("prefixcore prefix"),
        steps,
        relative_error=error,
    )
