"""Adapters of tiny models with a strong effect, so that a wrong detail shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import prefixcore
from prefixcore.adapters import read_adapter
from prefixcore.audit.probes import Probes, prepare
from prefixcore.audit.progress import Progress
from prefixcore.audit.virtual import VirtualTokens, virtual_tokens
from prefixcore.training import Example
from tests import tiny

EXAMPLES = [Example(f"{a}{b} ->", f" {b}{a}\n", f"example {a}{b}") for a in "abcd" for b in "vwx"]


@pytest.fixture(scope="session")
def model() -> Any:
    """Weights of a scale at which predictions are far from uniform."""
    model = tiny.model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny.tokenizer()


def save(model: Any, folder: Path, config: Any, tokenizer: Any) -> Path:
    with prefixcore.attach(model, config, tokenizer=tokenizer) as handle:
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        handle.save(folder, task="the other way round", record={"end": "\n", "data": "swap.jsonl"})
    return folder


@pytest.fixture(scope="session")
def prefix(model: Any, tokenizer: Any, tmp_path_factory: Any) -> Path:
    config = prefixcore.PrefixTuningConfig(init_text="ab -> ba\n")
    return save(model, tmp_path_factory.mktemp("adapters") / "prefix", config, tokenizer)


@pytest.fixture(scope="session")
def prompt(model: Any, tokenizer: Any, tmp_path_factory: Any) -> Path:
    config = prefixcore.PromptTuningConfig(init_text="swap:")
    return save(model, tmp_path_factory.mktemp("adapters") / "prompt", config, tokenizer)


@pytest.fixture(params=["prefix", "prompt"])
def adapter(request: Any) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture
def virtual(adapter: Path) -> VirtualTokens:
    return virtual_tokens(read_adapter(adapter))


@pytest.fixture
def probes(model: Any, tokenizer: Any) -> Probes:
    return prepare("swap", EXAMPLES, model, tokenizer, virtual_tokens=9, end="\n", limit=None)


@pytest.fixture
def quiet() -> Progress:
    return Progress(False)
