"""Greedy generation with a prefix on SmolLM2-135M's shape, eager and with a static cache compiled: time a token beside
the bare model's, and PEFT's where it can."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import prefixcore
from bench import models
from bench.gates import gate, relative_error
from bench.reference import peft_models
from bench.scale import pick
from bench.steps.check import COARSEST, LEEWAY, TOLERANCE

from . import clock
from .conftest import LeftOut, Measure
from .device import DEVICE, HALF, REAL
from .steps import SMALL, SMALL_VIRTUAL, batch_of, free, frozen

ROWS, LENGTH, NEW = (8, 32, 32) if REAL else (1, 3, 2)
CACHES = ["dynamic", "static"]


def generate(model: Any, ids: Tensor, cache: str, new: int, **more: Any) -> Any:
    """`new` tokens a row; with a static cache transformers compiles each step where there is a GPU."""
    static = {"cache_implementation": "static"} if cache == "static" else {}
    mask = torch.ones_like(ids)
    options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=mask, **options, **static, **more)


def logits(model: Any, ids: Tensor, tokens: Tensor) -> Tensor:
    """What the model says at each generated place, given all that stands before it."""
    with torch.no_grad():
        out = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    return out[:, ids.shape[1] - 1 : -1].float()


def check(ours: Any, theirs: Any, model: Any, ids: Tensor, cache: str) -> float:
    """The gate: at each step the logits of PEFT's prefix in float32, from the same start and after the same tokens."""
    found = generate(ours, ids, cache, NEW, output_logits=True, return_dict_in_generate=True)
    mine = torch.stack([step.float() for step in found.logits], 1)
    with torch.device(DEVICE):
        exact = peft_models.prefix_tuning(copy.deepcopy(model).float(), SMALL_VIRTUAL)
        with torch.no_grad():
            for to, start in zip(trained(exact), trained(theirs), strict=True):
                to.copy_(start)
    want = logits(exact, ids, found.sequences)
    off = relative_error(logits(theirs, ids, found.sequences), want)
    tolerance = min(COARSEST, max(TOLERANCE, LEEWAY * off))
    return gate("generation with our prefix", {"logits": mine}, {"logits": want}, tolerance)


def trained(wrapped: Any) -> list[Tensor]:
    return [parameter for parameter in wrapped.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("cache", pick(smoke=CACHES, quick=CACHES, full=CACHES))
def test_generation(measure: Measure, left_out: LeftOut, cache: str) -> None:
    model, ids = frozen(SMALL, 4096), batch_of(SMALL, ROWS, LENGTH)["input_ids"]
    with torch.device(DEVICE):
        theirs = peft_models.prefix_tuning(models.twin(model), SMALL_VIRTUAL)
        start = theirs.get_prompt_embedding_to_save("default")
    ours = models.twin(model)
    prefixcore.attach(ours, prefixcore.PrefixTuningConfig(init=start))
    error = check(ours, theirs, model, ids, cache)
    others = {"bare model": model}
    if cache == "dynamic":
        others["PEFT prefix"] = theirs
    else:
        left_out(
            "PEFT prefix", "its prefix is a cache of its own, which grows: transformers takes no static one beside it"
        )
    measure(
        "gpu generation",
        {"model": SMALL.name, "B": ROWS, "T": LENGTH, "P": SMALL_VIRTUAL, "new": NEW, "cache": cache},
        lambda: generate(ours, ids, cache, NEW),
        {name: (lambda who=who: generate(who, ids, cache, NEW)) for name, who in others.items()},
        seconds=clock.wall_seconds,
        relative_error=error,
        dtype=str(HALF).removeprefix("torch."),
    )
    torch._dynamo.reset()
    free()
