"""Greedy generation with a prefix and with a soft prompt, beside the bare model and PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import prefixcore
from bench import models
from bench.conftest import Measure
from bench.reference import peft_models
from bench.scale import pick

CASES = pick(
    smoke=[(models.TINY[0], 2, 5, 4, 3)],
    quick=[(models.SMALL[0], 4, 32, 64, 8)],
    full=[(models.SMALL[0], 4, 32, 64, 64), (models.SMALL[0], 4, 32, 1024, 64), (models.SMOLLM2_135M, 4, 32, 64, 64)],
)


BOTH = ["prefix", "prompt"]


@pytest.mark.parametrize("kind", pick(smoke=BOTH, quick=["prefix"], full=BOTH))
@pytest.mark.parametrize(("shape", "rows", "length", "virtual", "new"), CASES, ids=lambda x: getattr(x, "name", str(x)))
def test_greedy(
    measure: Measure, shape: models.Shape, rows: int, length: int, virtual: int, new: int, kind: str
) -> None:
    """The gate: the same tokens as PEFT's from the same start."""
    model = models.make(shape, positions=length + virtual + new)
    ids = models.batch(shape, rows, length)["input_ids"]
    tune = {"prefix": peft_models.prefix_tuning, "prompt": peft_models.prompt_tuning}[kind]
    theirs = tune(models.twin(model), virtual)
    start = theirs.get_prompt_embedding_to_save("default")
    config = {"prefix": prefixcore.PrefixTuningConfig, "prompt": prefixcore.PromptTuningConfig}[kind](init=start)
    ours = models.twin(model)
    prefixcore.attach(ours, config)

    def generate(who: Any) -> torch.Tensor:
        return who.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
        )

    if not torch.equal(generate(ours), generate(theirs)):
        pytest.fail(f"the model with our {kind} writes other tokens than PEFT, so nothing is reported")
    measure(
        "generation",
        {"model": shape.name, "B": rows, "T": length, "P": virtual, "new": new, "kind": kind},
        lambda: generate(ours),
        {"bare model": lambda: generate(model), "PEFT": lambda: generate(theirs)},
    )
