"""Whole training steps of Llama-shaped models in bfloat16, random weights: time and peak memory beside the bare frozen
model and PEFT's prefix tuning, with and without gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import models
from bench.scale import SCALE, pick
from bench.steps.contenders import MAKERS

from . import clock
from .conftest import Measure
from .device import REAL
from .steps import BARE, LORA, OURS, PEFT, TOY, batch_of, checked, contenders, free, frozen

LLAMA_1B = models.Shape("Llama 1B's shape", "llama", 16, 2048, 32, 8, 8192, 128256)
LLAMA_8B = models.Shape("Llama 8B's shape", "llama", 32, 4096, 32, 8, 14336, 128256)
ROWS, LENGTH = (2, 2048) if SCALE != "smoke" else (1, 5)

CASES = pick(
    smoke=[(TOY, 4, False), (TOY, 4, True)],
    quick=[*((LLAMA_1B, P, False) for P in (64, 8192, 512, 2048)), (LLAMA_1B, 64, True),
           (LLAMA_8B, 64, False), (LLAMA_8B, 2048, False), (LLAMA_8B, 64, True)],
    full=[(shape, P, checkpointing) for shape in (LLAMA_1B, LLAMA_8B) for P in (64, 512, 2048, 8192)
          for checkpointing in (False, True)],
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    frozen.cache_clear()
    free()


def model_of(shape: models.Shape, checkpointing: bool) -> Any:
    model = frozen(shape, LENGTH + 8192)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    return model.train(checkpointing)  # there is no dropout; only in training are activations left out


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
    error = checked(shape, ROWS, LENGTH, min(virtual, 512))
    free()
    model, batch = model_of(shape, checkpointing), batch_of(shape, ROWS, LENGTH)
    names = [OURS, BARE] if checkpointing else [OURS, BARE, PEFT]  # PEFT refuses a prefix together with checkpointing
    if virtual == CASES[0][1] and not checkpointing:  # its time has nothing to do with P
        names.append(LORA)
    peaks, state = {}, 0
    for name in names:
        peaks[name], own = peak(name, model, batch, virtual)
        state = own if name == OURS else state
        free()
    found = contenders(names, model, batch, virtual)
    calls = {name: contender.step for name, contender in found.items()}
    measure(
        "gpu step",
        {"model": shape.name, "B": ROWS, "T": LENGTH, "P": virtual, "checkpointing": checkpointing},
        calls.pop(OURS),
        calls,
        seconds=clock.seconds,
        relative_error=error,
        peak_bytes=peaks,
        state_bytes=state,
        peak_over_bare_and_state=peaks[OURS] / max(1, peaks[BARE] + state),
    )
    del found, calls
    free()
