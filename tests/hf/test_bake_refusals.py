"""What `bake` refuses: what no prefix is equal to, and what would not be written whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import prefixcore
from prefixcore.adapters import AdapterError, read_adapter
from prefixcore.hf.baking import source
from tests import tiny

from . import tiny_models
from .baked import PROMPTS, trained
from .models import assert_same, make, state, window_of


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gpt_oss"])
def test_windows_that_lose_sight_are_refused(family: str, tmp_path: Path) -> None:
    """The refusal is right: behind a window's length of text the two are not equal."""
    model = make(family, **window_of(family, 8))
    trained(model, PROMPTS["prompt"], tmp_path / "prompt")
    with pytest.raises(NotImplementedError, match=r"sliding window of 8 tokens .* never of a prefix"):
        prefixcore.bake(model, tmp_path / "prompt", tmp_path / "baked")
    with pytest.raises(NotImplementedError, match="sliding window"):
        prefixcore.bake(model, None, tmp_path / "baked", text="abc", tokenizer=tiny.tokenizer())
    assert not (tmp_path / "baked").exists()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_keys_that_move_with_the_length_are_refused(kind: str, tmp_path: Path) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 128}
    model = make("llama", rope_parameters=rope)
    trained(model, PROMPTS["prompt"], tmp_path / "prompt")
    with pytest.raises(NotImplementedError, match=f"rotary embeddings of the kind '{kind}'"):
        prefixcore.bake(model, tmp_path / "prompt", tmp_path / "baked")


@pytest.mark.parametrize(("name", "kind"), [("JambaForCausalLM", "jamba"), ("Llama4ForCausalLM", "llama4_text")])
def test_layers_that_are_no_attention_are_refused(name: str, kind: str, tmp_path: Path) -> None:
    model = tiny_models.make(name, kind)
    trained(model, prefixcore.PromptTuningConfig(num_virtual_tokens=2), tmp_path / "prompt")
    with pytest.raises(NotImplementedError, match=name):
        prefixcore.bake(model, tmp_path / "prompt", tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_virtual_tokens_in_the_text_are_refused(tmp_path: Path) -> None:
    model = make("llama")
    config = prefixcore.PromptTuningConfig(num_virtual_tokens=2, virtual_token_ids=[90, 91])
    trained(model, config, tmp_path / "placed")
    with pytest.raises(AdapterError, match="stand in the text, in place of the ids"):
        prefixcore.bake(model, tmp_path / "placed", tmp_path / "baked")


def test_no_room_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    model = make("gpt2", vocab_size=len(tokenizer))
    with pytest.raises(AdapterError, match="64 virtual tokens leave no room: the model has learned 64"):
        prefixcore.bake(model, None, tmp_path / "baked", text="x" * 64, tokenizer=tokenizer)
    assert prefixcore.bake(model, None, tmp_path / "b", text="x" * 55, tokenizer=tokenizer).num_virtual_tokens == 55


def test_what_is_not_equal_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    trained(model, PROMPTS["prompt"], tmp_path / "prompt")
    right = source.prompt_to_prefix

    def wrong(*arguments: Any) -> Any:
        return [(key, value.roll(1, 1)) for key, value in right(*arguments)]

    monkeypatch.setattr(source, "prompt_to_prefix", wrong)
    before = state(model)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(AdapterError, match=r"not equal to what it was baked from, and is not written: on an input"):
            prefixcore.bake(model.to(dtype), tmp_path / "prompt", tmp_path / "baked")
    assert not (tmp_path / "baked").exists()
    assert_same(before["attributes"], state(model)["attributes"])


def test_another_model_is_refused_unless_someone_insists(tmp_path: Path) -> None:
    measured: dict[str, Any] = {"metrics": {"exact match": 0.5}, "split": {"name": "test"}, "license": "MIT"}
    trained(make("llama"), PROMPTS["prompt"], tmp_path / "prompt", **measured)
    other = make("llama", seed=5)
    with pytest.raises(AdapterError, match="weights"):
        prefixcore.bake(other, tmp_path / "prompt", tmp_path / "baked")
    with pytest.warns(UserWarning, match="loaded all the same"):
        prefixcore.bake(other, tmp_path / "prompt", tmp_path / "baked", strict=False)
    manifest = read_adapter(tmp_path / "baked").manifest
    assert manifest is not None
    assert manifest.base_model["forced"]
    assert (manifest.metrics, manifest.license) == (None, "MIT")


def test_arguments_that_contradict_each_other(tmp_path: Path) -> None:
    model = tiny.model()
    for options in ({}, {"adapter": tmp_path, "text": "a"}, {"text": "a"}, {"adapter": tmp_path, "bos": True}):
        with pytest.raises(TypeError, match="bake: "):
            prefixcore.bake(model, options.pop("adapter", None), tmp_path / "x", **options)
    with pytest.raises(AdapterError, match="no such folder"):
        prefixcore.bake(model, tmp_path / "nowhere", tmp_path / "x")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("")
    with pytest.raises(AdapterError, match=r"todo\.txt"):
        prefixcore.bake(model, tmp_path / "nowhere", tmp_path / "notes")
