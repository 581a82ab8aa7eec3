"""A tiny Llama, a prefix and a soft prompt for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import prefixcore
from tests import tiny

FIXTURES = Path(__file__).parent / "fixtures"
P = 6


def make_adapter(model: Any, config: Any, folder: Path, **options: Any) -> Path:
    """An adapter whose values are those of no text."""
    generator = torch.Generator().manual_seed(5)
    with prefixcore.attach(model, config) as handle:
        with torch.no_grad():
            for parameter in handle.module.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        return handle.save(folder, **options)


@pytest.fixture(scope="session")
def model() -> Any:
    return tiny.model()


@pytest.fixture(scope="session")
def prefix(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = prefixcore.PrefixTuningConfig(num_virtual_tokens=P, num_frozen_tokens=1)
    return make_adapter(model, config, tmp_path_factory.mktemp("adapters") / "prefix", task="x -> y")


@pytest.fixture(scope="session")
def prompt(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = prefixcore.PTuningConfig(num_virtual_tokens=P)
    return make_adapter(model, config, tmp_path_factory.mktemp("adapters") / "prompt", task="x -> y")


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return torch.randint(2, 90, (2, 7), generator=torch.Generator().manual_seed(1))
