"""Dtypes, casts after attaching, other weights: virtual tokens act as the text, whatever the model is in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import QuantizedLayer

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig

from .models import FAMILIES, Tokenizer, after, make, padded, tokens

TEXT = "abcd"
BOTH = [PrefixTuningConfig(init_text=TEXT), PromptTuningConfig(init_text=TEXT)]
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    """How far apart, as a share of what is expected."""
    return float((got.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", BOTH, ids=["prefix", "prompt"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_before_and_after_attaching(family: str, when: str, config: Any, dtype: torch.dtype) -> None:
    model, ids = make(family), tokens(2, 7)
    expected = model(after(TEXT, ids)).logits[:, len(TEXT) :]
    if when == "before":
        model.to(dtype)
    handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    model.to(dtype)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got = model(ids).logits
        assert got.dtype == dtype
        assert off(got, expected) < (0.1 if dtype == torch.bfloat16 else 0.02)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in handle.parameters())
    if when == "before" and dtype == torch.bfloat16:
        model.generate(ids, **OPTIONS)


@pytest.mark.parametrize("config", BOTH, ids=["prefix", "prompt"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_autocast(family: str, config: Any) -> None:
    model, ids = make(family), tokens(2, 7)
    handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    expected = model(ids).logits
    for grad in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(grad):
            out = model(ids, labels=ids)
        assert off(out.logits, expected) < 0.1
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in handle.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.generate(ids, **OPTIONS).shape == (2, 15)


@pytest.mark.parametrize("config", BOTH, ids=["prefix", "prompt"])
def test_float16_with_a_scaler(config: Any) -> None:
    model, batch = make("llama"), padded("right")
    handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("config", BOTH, ids=["prefix", "prompt"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_grows(config: Any, tied: bool) -> None:
    """`resize_token_embeddings` replaces the table; the virtual tokens stay, and new ids are tokens of the text."""
    model, ids = make("llama", tie_word_embeddings=tied), tokens(2, 7)
    handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    with torch.no_grad():
        expected = model(ids).logits
        model.resize_token_embeddings(103)
        torch.testing.assert_close(model(ids).logits[..., :97], expected, rtol=1e-5, atol=1e-5)
        ids[0, 3] = 102
        assert torch.isfinite(model(ids).logits).all()
    for parameter in model.get_input_embeddings().parameters():
        parameter.requires_grad_(False)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in handle.parameters())


class Int8Linear(nn.Module):
    """Weights in eight bits, as libraries that quantise keep them: no floating-point parameter to look at."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).T


@pytest.mark.parametrize("config", BOTH, ids=["prefix", "prompt"])
def test_quantised_weights(config: Any) -> None:
    model, ids = make("llama"), tokens(2, 7)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, Int8Linear(child))
    expected = model(after(TEXT, ids)).logits[:, len(TEXT) :]
    handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in handle.parameters())


@pytest.mark.parametrize("config", BOTH, ids=["prefix", "prompt"])
def test_hooks_of_accelerate(config: Any) -> None:
    """A `device_map` puts a forward of its own on modules, before or after virtual tokens come."""
    from accelerate import dispatch_model

    expected_model, ids = make("llama"), tokens(2, 7)
    prefixcore.attach(expected_model, config, tokenizer=Tokenizer())
    expected = expected_model(ids).logits
    device_map = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.rotary_emb": "cpu"}
    for order in ("before", "after"):
        model = make("llama")
        if order == "before":
            model = dispatch_model(model, {**device_map}, force_hooks=True, main_device="cpu")
        handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
        if order == "after":
            model = dispatch_model(model, {**device_map, "prefixcore": "cpu"}, force_hooks=True, main_device="cpu")
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model.generate(ids, **OPTIONS), expected_model.generate(ids, **OPTIONS))
        handle.detach()
        assert not torch.allclose(model(ids).logits, expected, atol=1e-3)


@pytest.mark.parametrize("config", BOTH, ids=["prefix", "prompt"])
@pytest.mark.parametrize("way", ["embeddings", "beams", "sampled", "chunks", "static"])
def test_generate_as_the_text(way: str, config: Any) -> None:
    """The bare model goes on from [text][ids] in every way; with the text attached it goes on from [ids] likewise."""
    model, ids = make("llama"), tokens(2, 7)
    bare = copy.deepcopy(model)
    prefixcore.attach(model, config, tokenizer=Tokenizer())
    options: dict[str, Any] = {
        "embeddings": {},
        "beams": {"num_beams": 3, "num_return_sequences": 2},
        "sampled": {"do_sample": True, "top_k": 5},
        "chunks": {"prefill_chunk_size": 2},
        "static": {"cache_implementation": "static"},
    }[way]
    options = {**OPTIONS, **options}
    if way == "embeddings":
        got = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options)
        expected = bare.generate(after(TEXT, ids), **options)[:, len(TEXT) + 7 :]
        assert torch.equal(got, expected)
        return
    torch.manual_seed(3)
    expected = bare.generate(after(TEXT, ids), **options)[:, len(TEXT) :]
    torch.manual_seed(3)
    assert torch.equal(model.generate(ids, **options), expected)


class Int8Layer(QuantizedLayer):
    """Keys and values in eight bits, as the layers of optimum-quanto and HQQ keep them."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
        scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor: Any) -> torch.Tensor:
        numbers, scale = q_tensor
        return numbers.to(scale.dtype) * scale


@pytest.mark.parametrize("config", BOTH, ids=["prefix", "prompt"])
def test_a_quantised_cache(config: Any) -> None:
    """A prefix is not in the cache, so it is not rounded with it."""
    model, ids = make("llama"), tokens(2, 7)
    prefixcore.attach(model, config, tokenizer=Tokenizer())
    expected = model.generate(ids, return_dict_in_generate=True, output_logits=True, **OPTIONS)
    cache = Cache(layers=[Int8Layer(residual_length=2) for _ in range(2)])
    got = model.generate(ids, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **OPTIONS)
    assert 0 < off(got.logits[1], expected.logits[1]) < 0.05
    more = torch.cat((got.sequences, tokens(2, 3, seed=9)), 1)
    assert model.generate(more, past_key_values=cache, **OPTIONS).shape == (2, 26)
