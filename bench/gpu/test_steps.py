"""Whole training steps of Llama-shaped models in bfloat16, random weights: time and peak memory beside the bare frozen
model and PEFT's prefix tuning, with and without gradient checkpointing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import models
from bench.scale import SCALE, pick
from bench.steps.check import check
from bench.steps.contenders import MAKERS

from .conftest import Measure
from .device import DEVICE, HALF, REAL

LLAMA_1B = models.Shape("Llama 1B's shape", "llama", 16, 2048, 32, 8, 8192, 128256)
LLAMA_8B = models.Shape("Llama 8B's shape", "llama", 32, 4096, 32, 8, 14336, 128256)
ROWS, LENGTH = (2, 2048) if SCALE != "smoke" else (2, 9)
OURS, BARE, PEFT = "prefixcore prefix", "bare model", "PEFT prefix"

CASES = pick(
    smoke=[(models.TINY[0], 4, False), (models.TINY[0], 4, True)],
    quick=[*((LLAMA_1B, P, False) for P in (64, 512, 2048, 8192)), (LLAMA_1B, 64, True),
           (LLAMA_8B, 64, False), (LLAMA_8B, 2048, False), (LLAMA_8B, 64, True)],
    full=[(shape, P, checkpointing) for shape in (LLAMA_1B, LLAMA_8B) for P in (64, 512, 2048, 8192)
          for checkpointing in (False, True)],
)  # fmt: skip


@lru_cache(maxsize=1)
def frozen(shape: models.Shape) -> Any:
    with torch.device(DEVICE):
        return models.make(shape, positions=LENGTH + 8192, dtype=HALF)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    frozen.cache_clear()
    free()


def model_of(shape: models.Shape, checkpointing: bool) -> Any:
    model = frozen(shape)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    return model.train(checkpointing)  # there is no dropout; only in training are activations left out


def free() -> None:
    gc.collect()
    if REAL:
        torch.cuda.empty_cache()


def batch_of(shape: models.Shape) -> dict[str, Tensor]:
    return {name: x.to(DEVICE) for name, x in models.batch(shape, ROWS, LENGTH).items()}


@cache
def checked(shape: models.Shape, virtual: int) -> float:
    """The gate, on two layers of the shape: PEFT's logits, loss and gradient from one start."""
    few = replace(shape, layers=2)
    with torch.device(DEVICE):
        model = models.make(few, positions=LENGTH + virtual, dtype=HALF)
    short = {name: x[:, : min(LENGTH, 256)] for name, x in batch_of(few).items()}
    return check(model, short, virtual, kinds=("prefix",))


def peak(name: str, model: Any, batch: dict[str, Tensor], virtual: int) -> tuple[int, int]:
    """Bytes allocated at most in a step, weights included and no other contender about; and those of its own state."""
    contender = MAKERS[name](model, batch, virtual)
    for _ in range(2):
        contender.step()
    free()
    if not REAL:
        return 0, contender.state_bytes
    torch.cuda.reset_peak_memory_stats()
    contender.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), contender.state_bytes


@pytest.mark.parametrize(("shape", "virtual", "checkpointing"), CASES, ids=lambda x: getattr(x, "name", str(x)))
def test_step(measure: Measure, shape: models.Shape, virtual: int, checkpointing: bool) -> None:
    error = checked(shape, min(virtual, 512))
    free()
    model, batch = model_of(shape, checkpointing), batch_of(shape)
    others = [BARE] if checkpointing else [BARE, PEFT]  # PEFT refuses a prefix together with checkpointing
    peaks, state = {}, 0
    for name in (OURS, *others):
        peaks[name], own = peak(name, model, batch, virtual)
        state = own if name == OURS else state
        free()
    contenders = {name: MAKERS[name](model, batch, virtual) for name in (OURS, *others)}
    calls = {name: contender.step for name, contender in contenders.items()}
    measure(
        "gpu step",
        {"model": shape.name, "B": ROWS, "T": LENGTH, "P": virtual, "checkpointing": checkpointing},
        calls.pop(OURS),
        calls,
        {BARE: 1.03, "peak": 1.01},
        cold=False,
        relative_error=error,
        peak_bytes=peaks,
        state_bytes=state,
        peak_over_bare_and_state=peaks[OURS] / max(1, peaks[BARE] + state),
    )
    del contenders, calls
    free()
