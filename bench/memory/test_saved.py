"""Bytes kept for the backward: by one attention, and by a whole model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import models
from bench.attention_problem import NAMES, SEQUENCE, Attention, Problem, check, inputs
from bench.memory.saved import saved_bytes
from bench.ops.test_attention import ROWS, TOY, name
from bench.reference.bare_sdpa import bare_sdpa
from bench.reference.merged_flash import merged_flash
from bench.scale import SCALE, pick
from bench.steps.check import check_step
from bench.steps.contenders import MAKERS, Step
from bench.steps.test_training_step import BRIEF, MORE, REFERENCES

Note = Callable[..., None]


def kept(attention: Attention, tensors: dict[str, Tensor]) -> int:
    return saved_bytes(lambda: attention(*tensors.values()), without=tensors.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("problem", pick(smoke=[TOY], quick=ROWS[1:3], full=ROWS), ids=name)
def test_attention(note: Note, problem: Problem, dtype: str) -> None:
    """Beyond the inputs, which every implementation keeps. PEFT's mask is shared by all layers and is not counted."""
    error = check(problem, problem.ours(), NAMES[dtype], backward=True)
    tensors = inputs(problem, NAMES[dtype], gradients=True)
    concatenated = problem.concatenated()
    sequence = {n: tensors[n] for n in SEQUENCE}
    mask = concatenated.keywords["mask"] if isinstance(concatenated, partial) else torch.empty(0)
    note(
        "saved by attention",
        problem.case(dtype=dtype),
        partial(problem.ours(), *tensors.values()),
        relative_error=error,
        bytes={
            "candidate": kept(problem.ours(), tensors),
            "bare": kept(bare_sdpa, sequence),
            "concatenated": saved_bytes(lambda: concatenated(*tensors.values()), without=[*tensors.values(), mask]),
            "merged": kept(merged_flash, tensors),
        },
    )


TINY_OR_SMALL = pick(
    smoke=[(models.TINY[0], 9, 4)],
    quick=[(models.SMALL[0], 1024, 64)],
    full=[(models.SMALL[0], 1024, 64), (models.SMOLLM2_135M, 1024, 64)],
)


@pytest.mark.parametrize(("shape", "length", "virtual"), TINY_OR_SMALL, ids=lambda x: getattr(x, "name", str(x)))
def test_model(note: Note, shape: models.Shape, length: int, virtual: int) -> None:
    """All that a forward pass keeps, parameters and inputs apart. The labels make every token's logits count."""
    brief = SCALE == "quick"
    step = Step(shape, 1, length, virtual, brief=brief)
    error = check_step(step)
    model, batch = step.model(), step.batch()
    figures: dict[str, int] = {}
    for who in ["prefixcore prefix", *(BRIEF if brief else ["prefixcore prompt", *REFERENCES, *MORE])]:
        contender = MAKERS[who](model, batch, virtual)
        figures[who] = saved_bytes(forward(who, contender.model, batch), without=tensors_of(contender.model, batch))
    ours = MAKERS["prefixcore prefix"](model, batch, virtual)
    note(
        "saved by a model",
        {"model": shape.name, "B": 1, "T": length, "P": virtual},
        ours.step,
        relative_error=error,
        bytes=figures,
    )


def forward(who: str, model: Any, batch: dict[str, Tensor]) -> Callable[[], Any]:
    """The bare model gets its embeddings as a leaf, the others their ids."""
    if who != "bare model":
        return lambda: model(use_cache=False, **batch).loss
    rest = {n: x for n, x in batch.items() if n != "input_ids"}
    embed = model.get_input_embeddings()
    return lambda: model(inputs_embeds=embed(batch["input_ids"]).requires_grad_(), use_cache=False, **rest).loss


def tensors_of(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    return [*model.parameters(), *model.buffers(), *batch.values()]
