"""Whole training steps on the GPU: models, batches, the gate, and the ways of training side by side."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from bench import models
from bench.steps.check import check
from bench.steps.contenders import MAKERS, Contender

from .device import DEVICE, HALF, REAL

OURS, BARE, PEFT, LORA = "prefixcore prefix", "bare model", "PEFT prefix", "LoRA"
TOY = models.Shape("toy Llama", "llama", 1, 32, 2, 1, 32, 97)
"""For a rehearsal: interpreting a kernel takes a fraction of a second a head."""
SMALL = models.SMOLLM2_135M if REAL else TOY
SMALL_VIRTUAL = 20 if REAL else 3
GATED = 256  # tokens of a row in the gate: float64 answers of more would take longer than what is timed


@lru_cache(maxsize=1)
def frozen(shape: models.Shape, positions: int) -> Any:
    """A frozen model on the device; one at a time, since they are large."""
    with torch.device(DEVICE):
        return models.make(shape, positions=positions, dtype=HALF)


def batch_of(shape: models.Shape, rows: int, length: int) -> dict[str, Tensor]:
    return {name: x.to(DEVICE) for name, x in models.batch(shape, rows, length).items()}


@cache
def checked(shape: models.Shape, rows: int, length: int, virtual: int) -> float:
    """The gate, on two layers of the shape: PEFT's logits, loss and gradient from one start."""
    few, length = replace(shape, layers=min(2, shape.layers)), min(length, GATED)
    with torch.device(DEVICE):
        model = models.make(few, positions=length + virtual, dtype=HALF)
    return check(model, batch_of(few, rows, length), virtual, kinds=("prefix",))


def contenders(names: Sequence[str], model: Any, batch: dict[str, Tensor], virtual: int) -> dict[str, Contender]:
    """By name; all over the same frozen weights."""
    return {name: MAKERS[name](model, batch, virtual) for name in names}


def free() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if REAL:
        torch.cuda.empty_cache()
