"""The ways to train that a step is measured for, all over one set of frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import prefixcore
from bench import models
from bench.attention_problem import NAMES
from bench.reference import peft_models
from bench.reference.bare_model import bare_step

Batch = Mapping[str, Tensor]
LORA_RANK = 8


@dataclass(frozen=True)
class Step:
    """What a training step is measured on: B rows of T tokens, P virtual ones, of a model of this shape."""

    shape: models.Shape
    B: int
    T: int
    P: int
    ragged: bool = False  # padded rows of many lengths
    dtype: str = "fp32"
    brief: bool = False  # a long step: a prefix alone, beside the bare model and PEFT's

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("prefix",) if self.brief else ("prefix", "prompt")

    def model(self) -> Any:
        return models.make(self.shape, positions=self.T + self.P, dtype=NAMES[self.dtype])

    def batch(self) -> dict[str, Tensor]:
        return models.batch(self.shape, self.B, self.T, ragged=self.ragged)

    def case(self, **more: Any) -> dict[str, Any]:
        """What tells this step from others, for the table."""
        case = {"model": self.shape.name, "B": self.B, "T": self.T, "P": self.P}
        return {**case, "ragged": self.ragged, "dtype": self.dtype, **more}

    def __str__(self) -> str:
        return f"{self.shape.name}-{self.B}-{self.T}-{self.P}-{self.dtype}" + "-ragged" * self.ragged


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
    """Forward, backward and AdamW, fused, which is the default of transformers' Trainer."""
    trained = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

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
