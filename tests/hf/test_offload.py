"""Models whose weights accelerate keeps on the CPU or the disk between forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

import prefixcore
from prefixcore import PrefixTuningConfig, PromptBank, PromptTuningConfig, PTuningConfig

from .models import Tokenizer, make, padded, tokens

CONFIGS = [
    PrefixTuningConfig(init_text="abc"),
    PrefixTuningConfig(3, seed=0, reparameterization="mlp"),
    PromptTuningConfig(init_text="abc"),
    PTuningConfig(4, seed=0),
]


def offloaded(how: str, folder: Path, family: str = "llama") -> Any:
    model = make(family)
    if how == "cpu":
        cpu_offload(model)
    elif how == "disk":
        disk_offload(model, str(folder))
    else:  # as device_map does
        places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.rotary_emb", "lm_head"), "cpu")
        places |= dict.fromkeys(("model.layers.1", "model.norm"), "disk")
        dispatch_model(model, places, offload_dir=str(folder), main_device="cpu", force_hooks=True)
    assert any(parameter.is_meta for parameter in model.parameters())
    return model


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("how", ["cpu", "disk", "map"])
def test_it_computes_trains_generates_and_is_saved_as_the_whole_model_is(how: str, config: Any, tmp_path: Path) -> None:
    whole, model, batch = make("llama"), offloaded(how, tmp_path / "kept"), padded("left")
    handles = []
    for each in (whole, model):
        torch.manual_seed(0)
        handles.append(prefixcore.attach(each, config, tokenizer=Tokenizer()))
    losses = [each(**batch).loss for each in (whole, model)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for got, expected in zip(*(handle.parameters() for handle in reversed(handles)), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)
    del batch["labels"]
    ids = [each.generate(**batch, max_new_tokens=4, do_sample=False) for each in (whole, model)]
    assert torch.equal(*ids)
    handles[1].save(tmp_path / "a")
    handles[1].detach()
    seen = batch["attention_mask"].bool()
    with prefixcore.load(model, tmp_path / "a"), torch.no_grad():
        torch.testing.assert_close(model(**batch).logits[seen], whole(**batch).logits[seen])
    handles[0].detach()
    torch.testing.assert_close(model(**batch).logits[seen], whole(**batch).logits[seen])


@pytest.mark.parametrize("config", CONFIGS)
def test_virtual_tokens_that_were_offloaded_too_are_refused(config: Any) -> None:
    """accelerate puts copies in their place for a forward, so their gradients would be lost."""
    model = make("llama")
    prefixcore.attach(model, config, tokenizer=Tokenizer())
    cpu_offload(model)
    with pytest.raises(RuntimeError, match="would get no gradients: offload LlamaForCausalLM first .* then attach"):
        model(**padded("none"))
    if config in CONFIGS[1::2]:  # what they are made by is on no device
        with torch.no_grad(), pytest.raises(RuntimeError, match="then attach"):
            model(**padded("none"))


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS[::2])
def test_virtual_tokens_that_were_offloaded_too_are_read(config: Any) -> None:
    """Where no gradient is asked for, none is lost."""
    model, batch = make("llama"), padded("none")
    prefixcore.attach(model, config, tokenizer=Tokenizer())
    expected = model(**batch).logits
    cpu_offload(model)
    torch.testing.assert_close(model(**batch).logits, expected)


@torch.no_grad()
def test_a_bank(tmp_path: Path) -> None:
    logits = []
    for model in (make("gpt2"), offloaded("disk", tmp_path, "gpt2")):
        bank = PromptBank(model)
        bank.attach("a", PrefixTuningConfig(3, init="random", seed=0))
        bank.attach("b", PromptTuningConfig(3, init="random", seed=1))
        logits.append(model(tokens(3, 5), task_ids=["a", None, "b"]).logits)
    torch.testing.assert_close(*logits)


def test_a_model_whose_weights_are_nowhere_is_refused() -> None:
    model = make("llama").to("meta")
    with pytest.raises(ValueError, match="without values .* as model.embed_tokens.weight is: load its weights first"):
        prefixcore.attach(model, CONFIGS[0], tokenizer=Tokenizer())
