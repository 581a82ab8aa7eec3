"""The gate of whole steps: ours computes what PEFT does, and the model itself is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

import prefixcore
from bench import models
from bench.gates import gate, relative_error
from bench.steps.contenders import MAKERS, Batch, Step, lora
from prefixcore.nn import join_layers

TOLERANCE = 1e-4
"""Relative error, by norm, of logits and gradients through a whole float32 model, against PEFT's."""
LEEWAY, COARSEST = 1.5, 0.1
"""A model in bfloat16 is off by 1e-2 or more by itself, the more the deeper it is: with our virtual tokens it may be
off by so many times what it is with PEFT's, but never by more than the second, where a gate could tell nothing."""
CONFIGS = {"prefix": prefixcore.PrefixTuningConfig, "prompt": prefixcore.PromptTuningConfig}


def same_start(model: Any, twin: Any, batch: Batch, virtual: int, kind: str = "prefix") -> tuple[Any, Any]:
    """PEFT's `kind` of virtual tokens on `model`; and ours on `twin`, which has the same weights.

    Both start as ours does by default: from what the model itself computes for random words. PEFT's start, random
    numbers of unit size, drives a model with real weights to where its gradient is mostly rounding, PEFT's as ours.
    """
    handle = prefixcore.attach(twin, CONFIGS[kind](virtual, seed=0))
    theirs = MAKERS[f"PEFT {kind}"](model, batch, virtual).model
    with torch.no_grad():
        peft_weight(theirs).copy_(as_peft(handle, lambda parameter: parameter))
    return theirs, handle


def as_peft(handle: Any, what: Callable[[Any], Tensor]) -> Tensor:
    """`what` of our parameters, laid out as PEFT lays out its own."""
    module = handle.module
    if isinstance(handle.config, prefixcore.PrefixTuningConfig):
        return join_layers([(what(layer.key), what(layer.value)) for layer in module.layers])
    return what(module.embedding)


def gradient(handle: Any) -> Tensor:
    return as_peft(handle, lambda parameter: parameter.grad)


def peft_weight(wrapped: Any) -> Any:
    return wrapped.prompt_encoder["default"].embedding.weight


def answers(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Logits and loss; the gradients are left where they belong."""
    out = model(use_cache=False, **batch)
    out.loss.backward()
    seen = batch["attention_mask"].bool()  # what a model says about padding is nobody's business
    logits = out.logits[:, -seen.shape[1] :]  # PEFT's prompt has logits of its own
    return {"logits": logits[seen], "loss": out.loss}


def rounding(model: Any, batch: Batch, virtual: int, kind: str, start: Tensor, exact: Mapping[str, Tensor]) -> float:
    """How far PEFT is off from `exact` in the dtype of `model`, from the same start."""
    wrapped = MAKERS[f"PEFT {kind}"](model, batch, virtual).model
    weight = peft_weight(wrapped)
    with torch.no_grad():
        weight.copy_(start)
    found = {**answers(wrapped, batch), "gradient": weight.grad}
    return max(relative_error(found[name], want) for name, want in exact.items())


def check(model: Any, batch: Batch, virtual: int, kinds: Sequence[str] = ("prefix", "prompt")) -> float:
    """From one start, ours gives the logits, the loss and the gradient of PEFT's in float32.

    With nothing attached, as with LoRA at its start, the model gives its own logits. Returns the greatest error.
    """
    exact = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    with torch.no_grad():
        own = {"logits": model(**batch).logits}
    worst = 0.0
    for kind in kinds:
        twin = models.twin(model)
        theirs, handle = same_start(exact, twin, batch, virtual, kind)
        weight = peft_weight(theirs)
        want = {**answers(theirs, batch), "gradient": weight.grad}
        tolerance = TOLERANCE
        if exact is not model:
            tolerance = min(COARSEST, LEEWAY * rounding(model, batch, virtual, kind, weight.detach(), want))
        mine = {**answers(twin, batch), "gradient": gradient(handle)}
        worst = max(worst, gate(f"the model with our {kind}", mine, want, tolerance))
        with torch.no_grad(), handle.disabled():
            mine = {"logits": twin(**batch).logits}
        gate(f"the model with our {kind} disabled", mine, own, 1e-6)
    with torch.no_grad():  # LoRA starts as the model itself
        mine = {"logits": lora(model, batch, virtual).model(**batch).logits}
    gate("the model with LoRA", mine, own, TOLERANCE)
    return worst


@cache
def check_step(step: Step) -> float:
    """`check` on what `step` says, made once a process."""
    return check(step.model(), step.batch(), step.P, step.kinds)
