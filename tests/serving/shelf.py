"""A registry of tiny adapters for the tests of serving."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

import prefixcore
from tests import tiny


def write(
    folder: Path, *, seed: int = 0, tokens: int = 3, model: Any = None, strength: float = 2.0, **options: Any
) -> Path:
    """A prefix of random numbers for the tiny model, strong enough to change its answers."""
    model = tiny.model() if model is None else model
    config = prefixcore.PrefixTuningConfig(num_virtual_tokens=tokens, init="random", seed=seed, **options)
    with prefixcore.attach(model, config) as handle:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for parameter in handle.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * strength)
        return handle.save(folder, task=f"task {seed}")


def soft_prompt(folder: Path, tokens: int = 3, *, seed: int = 0, model: Any = None) -> Path:
    """A soft prompt for the tiny model, of random numbers that are as large as its embeddings."""
    model = tiny.model() if model is None else model
    config = prefixcore.PromptTuningConfig(num_virtual_tokens=tokens, init="random", seed=seed)
    with prefixcore.attach(model, config) as handle:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for parameter in handle.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
                parameter.mul_(model.get_input_embeddings().weight.std())
        return handle.save(folder, task=f"asked {seed}")


def replace(folder: Path, **options: Any) -> None:
    """Another adapter in the same place."""
    shutil.rmtree(folder)
    write(folder, **options)


def damage(folder: Path) -> None:
    """One bit of the tensors turned over, as a broken disk does."""
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
