"""A training step on examples that begin alike, as a tree in which a beginning stands once, beside the packed batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import prefixcore
from bench import models
from bench.conftest import Measure
from bench.gates import gate
from bench.models import SMALL, SMOLLM2_REAL, TINY, Shape
from bench.scale import SCALE, pick
from bench.steps.contenders import MAKERS
from bench.steps.packed import Data
from prefixcore.hf.shared_texts import sharing_width
from prefixcore.training import TokenizedExample
from prefixcore.training.batch import Batch, call_model

# Tokens that all examples begin with, those of a prompt after them, answers a prompt, tokens of an answer.
CASES = pick(
    smoke=[(TINY[0], 12, 4, 2, 3)],
    quick=[(SMALL[0], 100, 8, 1, 8)],
    full=[
        (SMALL[0], 100, 8, 1, 8),
        *((SMOLLM2_REAL, *sizes) for sizes in ((100, 8, 1, 8), (0, 40, 4, 8), (0, 8, 2, 4), (400, 40, 1, 20))),
    ],
)
ROWS = 8
VIRTUAL = 4 if SCALE == "smoke" else 20
TOLERANCE = 1e-4
"""Relative error, by norm, of loss and gradient against the packed batch's in float32."""


def alike(vocabulary: int, common: int, prompt: int, answers: int, answer: int) -> Data:
    """Examples of random tokens, of which all begin with `common` ones, and some have the same prompt."""
    g = torch.Generator().manual_seed(0)

    def words(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=g).tolist()

    beginning = words(common)
    prompts = [[*beginning, *words(prompt)] for _ in range(ROWS // answers)]
    return Data([TokenizedExample(each, words(answer)) for each in prompts for _ in range(answers)], VIRTUAL)


@pytest.mark.parametrize(
    ("shape", "common", "prompt", "answers", "answer"), CASES, ids=lambda x: getattr(x, "name", str(x))
)
def test_shared_texts(
    measure: Measure,
    leave_out: Callable[..., Any],
    shape: Shape,
    common: int,
    prompt: int,
    answers: int,
    answer: int,
) -> None:
    data = alike(shape.vocabulary, common, prompt, answers, answer)
    name = f"{common} tokens in common, {answers} answers a prompt"
    case = data.case(shape.name, name, "prefix")
    if reason := models.missing(shape):
        leave_out("shared texts", case, reason)
    model = models.make(shape, positions=case["T"] + data.virtual)
    twin = models.twin(model).train()
    handle = prefixcore.attach(twin, prefixcore.PrefixTuningConfig(data.virtual, init="random", seed=0))
    cpu = torch.device("cpu")
    tree = Batch.of(data.examples, 0, packed=True, device=cpu, sharing_width=sharing_width(handle))
    packed = Batch.of(data.examples, 0, packed=True, device=cpu)
    case["nodes"] = tree.shape[1]
    learnt = []
    for batch in (packed, tree):
        handle.module.zero_grad()
        loss = call_model(twin, batch).loss
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in handle.parameters() if p.grad is not None])
        learnt.append({"loss": loss.detach(), "gradient": gradients})
    error = gate("a tree of examples", learnt[1], learnt[0], TOLERANCE)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-4, fused=True)

    def step(batch: Batch) -> Callable[[], None]:
        def once() -> None:
            optimizer.zero_grad(set_to_none=True)
            call_model(twin, batch).loss.backward()
            optimizer.step()

        return once

    references = {
        "packed": step(packed),
        "bare model": MAKERS["bare model"](model, data.padded(), data.virtual).step,
    }
    measure("shared texts", case, step(tree), references, relative_error=error)
