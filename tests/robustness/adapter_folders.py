"""What the tests of loading share: an adapter of each kind, copies to damage, and a load that must be refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import prefixcore
from prefixcore import AdapterError
from prefixcore.adapters import write_adapter
from prefixcore.adapters.manifest import Manifest

from ..adapters.models import CONFIGS, SHAPES, make_model, make_module
from ..hf.models import assert_same, state

__all__ = ["copy_of", "kinds", "model"]

MODEL, STATE = "adapter_model.safetensors", "training_state.safetensors"
PEFT, MANIFEST, RECORD = "adapter_config.json", "prefixcore_manifest.json", "training.json"

KINDS = {
    "ours": "prefix-basis",
    "peft": "prefix",
    "frozen": "prefix-frozen",
    "mlp": "prefix-mlp",
    "prompt": "prompt",
    "lstm": "p-tuning-lstm",
}
NOT_BY_PREFIXCORE = ("peft", "prompt")
"""Kinds of which a copy without manifest is there too, as PEFT would have written it."""


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


@pytest.fixture(scope="module")
def kinds(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    record = {
        "model": "m",
        "data": "d.jsonl",
        "end": "\n",
        "split": {"seed": 1, "fraction": 0.1},
        "held_out": {"bare model": {"loss": 1.0, "exact_match": 0.5, "examples": 3}},
        "train_loss": [[1, 2.0]],
        "held_out_loss": [],
        "interrupted": False,
    }
    folders = {}
    for kind, name in KINDS.items():
        config = CONFIGS[name]
        prefix = isinstance(config, prefixcore.PrefixTuningConfig)
        shapes = SHAPES["llama"] if prefix else []
        manifest = Manifest.create(model, config, shapes if prefix else None, task="a task")
        module = make_module(config, shapes)
        folders[kind] = write_adapter(root / kind, module=module, config=config, manifest=manifest, record=record)
    for kind in NOT_BY_PREFIXCORE:
        folders[f"{kind} alone"] = shutil.copytree(root / kind, root / f"{kind} alone")
        (folders[f"{kind} alone"] / MANIFEST).unlink()
    return folders


@pytest.fixture
def copy_of(kinds: dict[str, Path], tmp_path: Path) -> Any:
    def copied(kind: str) -> Path:
        shutil.rmtree(tmp_path / kind, ignore_errors=True)
        return shutil.copytree(kinds[kind], tmp_path / kind)

    return copied


def refused(model: Any, folder: Path, *names: str, trainable: bool = False) -> str:
    before = state(model)
    with pytest.raises(AdapterError) as caught:
        prefixcore.load(model, folder, trainable=trainable)
    assert_same(before, state(model))
    message = str(caught.value)
    assert any(name in message for name in names), message
    assert message.isprintable()
    assert len(message) < 2000
    return message
