"""Adapters of an attached model: saved, loaded, trained on, refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import prefixcore
from prefixcore import AdapterError, PrefixTuningConfig, PromptTuningConfig, PTuningConfig

from .models import FAMILIES, Tokenizer, assert_same, make, padded, state

CONFIGS = [
    PrefixTuningConfig(init_text="abcd"),
    PrefixTuningConfig(init_text="abcd", layers=[1], num_frozen_tokens=1),
    PrefixTuningConfig(num_virtual_tokens=4, init="random", reparameterization="mlp"),
    PrefixTuningConfig(init_text="abcd", reparameterization="low_rank", rank=1),
    PrefixTuningConfig(init_text="abcd", reparameterization="random_basis", num_basis=40),
    PromptTuningConfig(init_text="abcd"),
    PTuningConfig(num_virtual_tokens=4, encoder_reparameterization_type="LSTM"),
]


def train(model: Any, handle: prefixcore.Handle, steps: int = 2) -> None:
    """Plain SGD: no state that an adapter would have to hold."""
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**padded("left")).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("config", CONFIGS)
def test_saved_and_loaded_it_is_the_same(config: Any, tmp_path: Path) -> None:
    model, batch = make("llama"), padded("left")
    handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    train(model, handle)
    assert handle.save(tmp_path / "adapter", task="tests") == tmp_path / "adapter"
    expected = model(**batch).logits
    handle.detach()

    before = state(model)
    loaded = prefixcore.load(model, tmp_path / "adapter")
    assert loaded.num_trainable == 0
    assert loaded.num_virtual_tokens == 4
    assert not any(p.requires_grad for p in model.parameters())
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[seen], expected[seen], rtol=1e-5, atol=1e-5)
    loaded.detach()
    torch.set_rng_state(before["rng"])
    assert_same(before, state(model))


@pytest.mark.parametrize("config", CONFIGS)
def test_training_goes_on_exactly(config: Any, tmp_path: Path) -> None:
    """Two steps, saved, loaded and two more are four steps, bit for bit."""
    whole = make("llama")
    handle = prefixcore.attach(whole, config, tokenizer=Tokenizer())
    train(whole, handle, 2)
    handle.save(tmp_path / "adapter")
    train(whole, handle, 2)

    again = make("llama")
    resumed = prefixcore.load(again, tmp_path / "adapter", trainable=True)
    assert resumed.num_trainable == handle.num_trainable
    train(again, resumed, 2)
    for got, expected in zip(resumed.parameters(), handle.parameters(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_saved_again_after_loading(config: Any, tmp_path: Path) -> None:
    model, batch = make("llama"), padded("left")
    handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    handle.save(tmp_path / "one")
    expected = model(**batch).logits
    handle.detach()
    with prefixcore.load(model, tmp_path / "one") as frozen:
        frozen.save(tmp_path / "two")
    with prefixcore.load(model, tmp_path / "two", trainable=True) as loaded:
        assert loaded.num_trainable > 0
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[5]])
def test_every_family(family: str, config: Any, tmp_path: Path) -> None:
    model, batch = make(family), padded("left")
    with prefixcore.attach(model, config, tokenizer=Tokenizer()) as handle:
        handle.save(tmp_path / "adapter")
        expected = model(**batch).logits
    seen = batch["attention_mask"].bool()
    with prefixcore.load(model, tmp_path / "adapter"):
        torch.testing.assert_close(model(**batch).logits[seen], expected[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=["prefix", "prefix-mlp", "prompt", "p-tuning"],
)
@pytest.mark.parametrize("trainable", [False, True])
def test_what_peft_saved(config: Any, trainable: bool, tmp_path: Path) -> None:
    model, batch = make("llama"), padded("right")
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(tmp_path)
    expected = theirs(**batch)
    handle = prefixcore.load(model, tmp_path, trainable=trainable)
    got = model(**batch)
    torch.testing.assert_close(got.logits, expected.logits[:, -9:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-5)
    if trainable:
        got.loss.backward()
        assert all(p.grad is not None for p in handle.parameters())


@pytest.mark.parametrize(("config", "kind"), [(CONFIGS[0], "prefix"), (CONFIGS[5], "prompt")])
def test_what_peft_loads(config: Any, kind: str, tmp_path: Path) -> None:
    model, batch = make("llama"), padded("right")
    with prefixcore.attach(model, config, tokenizer=Tokenizer()) as handle:
        train(model, handle)
        handle.save(tmp_path / "adapter")
        expected = model(**batch)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").eval()(**batch)
    torch.testing.assert_close(theirs.logits[:, -9:], expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.loss, expected.loss, rtol=1e-5, atol=1e-5)


def _others() -> list[tuple[Any, str]]:
    return [
        (make("llama", seed=4), "weights"),
        (make("llama", num_hidden_layers=3), "num_hidden_layers|num_parameters"),
        (make("llama", num_key_value_heads=4), "num_key_value_heads|num_parameters"),
        (make("qwen2"), "class|model_type"),
    ]


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[5]])
def test_another_model_is_refused_and_left_untouched(config: Any, tmp_path: Path) -> None:
    with prefixcore.attach(make("llama"), config, tokenizer=Tokenizer()) as handle:
        handle.save(tmp_path / "adapter")
    for other, field in _others():
        before = state(other)
        with pytest.raises(AdapterError, match=field):
            prefixcore.load(other, tmp_path / "adapter")
        assert_same(before, state(other))


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (peft.PrefixTuningConfig(num_virtual_tokens=4), {"num_hidden_layers": 3}, "for 2 layers, but the model has 3"),
        (peft.PrefixTuningConfig(num_virtual_tokens=4), {"num_key_value_heads": 4}, "prefix of layer 0"),
        (peft.PrefixTuningConfig(num_virtual_tokens=4), {"head_dim": 8}, "prefix of layer 0"),
        (peft.PromptTuningConfig(num_virtual_tokens=4), {"hidden_size": 64}, "have 32 numbers"),
    ],
)
def test_an_adapter_of_peft_that_does_not_fit(config: Any, changes: Any, message: str, tmp_path: Path) -> None:
    config.task_type = "CAUSAL_LM"
    peft.get_peft_model(make("llama"), config).save_pretrained(tmp_path)
    other = make("llama", **changes)
    before = state(other)
    with pytest.raises(AdapterError, match=message):
        prefixcore.load(other, tmp_path)
    assert_same(before, state(other))


def test_a_damaged_file_and_an_attached_model(tmp_path: Path) -> None:
    model = make("llama")
    handle = prefixcore.attach(model, CONFIGS[0], tokenizer=Tokenizer())
    handle.save(tmp_path / "adapter")
    with pytest.raises(ValueError, match="already"):
        prefixcore.load(model, tmp_path / "adapter")
    handle.detach()
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    before = state(model)
    with pytest.raises(AdapterError, match="adapter_model"):
        prefixcore.load(model, tmp_path / "adapter")
    with pytest.raises(AdapterError):
        prefixcore.load(model, tmp_path / "nothing here")
    assert_same(before, state(model))
