"""The ways to train that a step is measured for, all over one set of frozen weights, and the gate that they pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import prefixcore
from bench import models
from bench.gates import gate
from bench.reference import peft_models
from bench.reference.bare_model import bare_step
from prefixcore.nn import join_layers

Batch = Mapping[str, Tensor]
TOLERANCE = 1e-4
"""Relative error, by norm, of logits and gradients through a whole float32 model."""
LORA_RANK = 8


@dataclass
class Contender:
    """A model in training. `step` is a whole one; `state_bytes` what is trained, with gradient and optimizer."""

    model: Any
    step: Callable[[], None]
    trained: int = 0

    @property
    def state_bytes(self) -> int:
        """Parameters, gradients and AdamW's two moments, in float32."""
        return 4 * 4 * self.trained


def training(model: Any, parameters: Any, batch: Batch) -> Contender:
    """Forward, backward and AdamW."""
    trained = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(use_cache=False, **batch).loss.backward()
        optimizer.step()

    return Contender(model, step, sum(p.numel() for p in trained))


def bare(model: Any, batch: Batch, virtual: int) -> Contender:
    twin = models.twin(model)
    return Contender(twin, bare_step(twin, batch))


def peft_prefix(model: Any, batch: Batch, virtual: int) -> Contender:
    wrapped = peft_models.prefix_tuning(models.twin(model), virtual)
    return training(wrapped, wrapped.parameters(), batch)


def peft_prompt(model: Any, batch: Batch, virtual: int) -> Contender:
    wrapped = peft_models.prompt_tuning(models.twin(model), virtual)
    return training(wrapped, wrapped.parameters(), batch)


def peft_cartridge(model: Any, batch: Batch, virtual: int) -> Contender:
    wrapped = peft_models.cartridge(models.twin(model), virtual)
    return training(wrapped, wrapped.parameters(), batch)


def lora(model: Any, batch: Batch, virtual: int) -> Contender:
    wrapped = peft_models.lora(models.twin(model), LORA_RANK, everywhere=False)
    return training(wrapped, wrapped.parameters(), batch)


def lora_everywhere(model: Any, batch: Batch, virtual: int) -> Contender:
    wrapped = peft_models.lora(models.twin(model), LORA_RANK, everywhere=True)
    return training(wrapped, wrapped.parameters(), batch)


def our_prefix(model: Any, batch: Batch, virtual: int) -> Contender:
    return _ours(model, batch, prefixcore.PrefixTuningConfig(virtual, init="random", seed=0))


def our_prompt(model: Any, batch: Batch, virtual: int) -> Contender:
    return _ours(model, batch, prefixcore.PromptTuningConfig(virtual, init="random", seed=0))


def _ours(model: Any, batch: Batch, config: Any) -> Contender:
    twin = models.twin(model)
    handle = prefixcore.attach(twin, config)
    return training(twin, handle.parameters(), batch)


MAKERS: dict[str, Callable[[Any, Batch, int], Contender]] = {
    "prefixcore prefix": our_prefix,
    "prefixcore prompt": our_prompt,
    "bare model": bare,
    "PEFT prefix": peft_prefix,
    "PEFT prompt": peft_prompt,
    "PEFT Cartridge": peft_cartridge,
    "LoRA": lora,
    "LoRA, all linear": lora_everywhere,
}


def check(model: Any, batch: Batch, virtual: int) -> float:
    """The gate of whole steps: from one start, ours and PEFT's give the same logits, loss and gradient, and with
    nothing attached, as with LoRA at its start, the model gives its own logits. Returns the greatest relative error."""
    worst = 0.0
    for kind in ("prefix", "prompt"):
        theirs = MAKERS[f"PEFT {kind}"](model, batch, virtual).model
        start = theirs.get_prompt_embedding_to_save("default")
        config = {"prefix": prefixcore.PrefixTuningConfig, "prompt": prefixcore.PromptTuningConfig}[kind](init=start)
        twin = models.twin(model)
        handle = prefixcore.attach(twin, config)
        module: Any = handle.module
        expected, got = theirs(use_cache=False, **batch), twin(use_cache=False, **batch)
        expected.loss.backward()
        got.loss.backward()
        logits = expected.logits[:, -batch["input_ids"].shape[1] :]  # PEFT's prompt has logits of its own
        if kind == "prefix":
            gradient = join_layers([(layer.key.grad, layer.value.grad) for layer in module.layers])
        else:
            gradient = module.embedding.grad
        seen = batch["attention_mask"].bool()  # what a model says about padding is nobody's business
        want = {
            "logits": logits[seen],
            "loss": expected.loss,
            "gradient": theirs.prompt_encoder["default"].embedding.weight.grad,
        }
        mine = {"logits": got.logits[seen], "loss": got.loss, "gradient": gradient}
        worst = max(worst, gate(f"the model with our {kind}", mine, want, TOLERANCE))
        with torch.no_grad(), handle.disabled():
            mine = {"logits": twin(**batch).logits[seen]}
        with torch.no_grad():
            own = {"logits": model(**batch).logits[seen]}
        gate(f"the model with our {kind} disabled", mine, own, 1e-6)
    with torch.no_grad():  # LoRA starts as the model itself
        mine = {"logits": lora(model, batch, virtual).model(**batch).logits[seen]}
    gate("the model with LoRA", mine, own, TOLERANCE)
    return worst
