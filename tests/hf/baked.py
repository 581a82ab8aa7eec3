"""What the tests of `bake` share: adapters of each method, and what the bare model says of the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import prefixcore

from .models import window_of

P = 5
PROMPTS = {
    "prompt": prefixcore.PromptTuningConfig(num_virtual_tokens=P),
    "low rank": prefixcore.PromptTuningConfig(num_virtual_tokens=P, reparameterization="low_rank", rank=2),
    "p-tuning": prefixcore.PTuningConfig(num_virtual_tokens=P, init="random"),
    "lstm": prefixcore.PTuningConfig(num_virtual_tokens=P, encoder_reparameterization_type="LSTM"),
}
PREFIXES = {
    "plain": prefixcore.PrefixTuningConfig(num_virtual_tokens=P, num_frozen_tokens=1),
    "mlp": prefixcore.PrefixTuningConfig(num_virtual_tokens=P, prefix_projection=True, layers=[1]),
    "random basis": prefixcore.PrefixTuningConfig(num_virtual_tokens=P, reparameterization="random_basis", num_basis=9),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.1}


def wide(family: str) -> dict[str, int]:
    """Windows that never lose sight of anything, where the family has windows."""
    return window_of(family, 256)


def trained(model: Any, config: Any, folder: Path, **options: Any) -> Path:
    """An adapter whose values are those of no text."""
    with prefixcore.attach(model, config) as handle:
        move(handle.module)
        return handle.save(folder, **options)


def move(module: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
