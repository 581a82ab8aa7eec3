"""A prefix or a prompt that starts from a text has the effect of the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig
from prefixcore.hf.families import ALL_LAYERS

from .models import FAMILIES, KNOWN, VOCABULARY, WINDOWED, Tokenizer, make, tokens

TEXT = "hello, world"


def text_and(rest: torch.Tensor) -> torch.Tensor:
    ids = torch.tensor([Tokenizer()(TEXT)["input_ids"]])
    return torch.cat((ids.expand(rest.shape[0], -1), rest), 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [PrefixTuningConfig(init_text=TEXT), PromptTuningConfig(init_text=TEXT)])
def test_logits_and_greedy_tokens_of_the_text(family: str, config: Any) -> None:
    model, rest = make(family), tokens(2, 9)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    expected = model(text_and(rest)).logits[:, len(TEXT) :]
    written = model.generate(text_and(rest), **options)[:, len(TEXT) :]

    handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    assert handle.num_virtual_tokens == handle.config.num_virtual_tokens == len(TEXT)
    torch.testing.assert_close(model(rest).logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(rest, **options), written)


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_slides_over_the_sequence_only(family: str) -> None:
    """Against the bare model with a mask that says so: the text is seen by all, the rest through the window."""
    window = 4
    model, rest = make(family, sliding_window=window), tokens(2, 9)
    length, total = len(TEXT), len(TEXT) + rest.shape[1]
    i, j = torch.arange(total)[:, None], torch.arange(total)
    windowed = (j <= i) & (j > i - window)
    masks = {"full_attention": j <= i, "sliding_attention": windowed | ((i >= length) & (j < length))}
    masks = {kind: torch.where(mask, 0.0, -torch.inf).expand(2, 1, -1, -1) for kind, mask in masks.items()}
    model.set_attn_implementation("eager")
    mask = masks["sliding_attention"] if KNOWN[family].sliding_window == ALL_LAYERS else masks
    expected = model(text_and(rest), attention_mask=mask).logits[:, length:]

    prefixcore.attach(model, PrefixTuningConfig(init_text=TEXT), tokenizer=Tokenizer())
    torch.testing.assert_close(model(rest).logits, expected, rtol=1e-5, atol=1e-5)
    # Token by token through the cache, which forgets what the window has passed.
    whole = model.generate(rest[:, :3], max_new_tokens=12, do_sample=False, eos_token_id=None)
    slow = model.generate(rest[:, :3], max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(whole, slow)


@pytest.mark.parametrize("config_class", [PrefixTuningConfig, PromptTuningConfig])
@pytest.mark.parametrize("length", [3, len(TEXT), 20])
def test_a_text_is_cut_or_repeated(config_class: Any, length: int) -> None:
    model, rest = make("llama"), tokens(1, 5)
    text = (TEXT * 2)[:length]
    ids = torch.tensor([Tokenizer()(text)["input_ids"]])
    expected = model(torch.cat((ids, rest), 1)).logits[:, length:]
    prefixcore.attach(model, config_class(num_virtual_tokens=length, init_text=TEXT), tokenizer=Tokenizer())
    torch.testing.assert_close(model(rest).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config_class", [PrefixTuningConfig, PromptTuningConfig])
def test_vocab_is_the_text_of_drawn_tokens(config_class: Any) -> None:
    from prefixcore.nn import vocab_ids

    model, rest = make("llama"), tokens(1, 5)
    ids = vocab_ids(VOCABULARY, 6, seed=4)[None]
    expected = model(torch.cat((ids, rest), 1)).logits[:, 6:]
    prefixcore.attach(model, config_class(num_virtual_tokens=6, seed=4))
    torch.testing.assert_close(model(rest).logits, expected, rtol=1e-5, atol=1e-5)


def test_tokenizer_named_in_the_config(tmp_path: Any) -> None:
    from .. import tiny

    model = tiny.model()
    tiny.tokenizer().save_pretrained(tmp_path)
    config = PrefixTuningConfig(init_text="abc", tokenizer_name_or_path=str(tmp_path))
    assert prefixcore.attach(model, config).num_virtual_tokens == 3


def test_a_text_without_a_tokenizer_or_with_another_models() -> None:
    model = make("llama")
    with pytest.raises(ValueError, match="needs a tokenizer"):
        prefixcore.attach(model, PrefixTuningConfig(init_text="abc"))
    with pytest.raises(ValueError, match=f"token id {VOCABULARY}.*another model's"):
        prefixcore.attach(
            model, PrefixTuningConfig(init_text="abc"), tokenizer=lambda text: {"input_ids": [VOCABULARY]}
        )
    with pytest.raises(ValueError, match=r"prefixcore\.load"):
        prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=3, init="tensor"))


@pytest.mark.parametrize("reparameterization", ["mlp", "low_rank", "random_basis"])
def test_a_reparameterized_prefix_starts_there_too(reparameterization: str) -> None:
    model, rest = make("llama"), tokens(1, 5)
    expected = model(text_and(rest)).logits[:, len(TEXT) :]
    config = PrefixTuningConfig(init_text=TEXT, reparameterization=reparameterization, rank=2, num_basis=50)
    handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    out = model(rest, labels=rest)
    torch.testing.assert_close(out.logits, expected, rtol=1e-5, atol=1e-5)
    out.loss.backward()
    assert any(p.grad.abs().max() > 0 for p in handle.parameters())
    if reparameterization == "random_basis":
        assert handle.num_trainable == 50


def test_frozen_virtual_tokens_stay() -> None:
    model, rest = make("llama"), tokens(2, 5)
    config = PrefixTuningConfig(init_text=TEXT, num_frozen_tokens=2)
    handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    before = handle.bake()
    optimizer = torch.optim.SGD(handle.parameters(), lr=1.0)
    model(rest, labels=rest).loss.backward()
    optimizer.step()
    for (key, value), (old_key, old_value) in zip(handle.bake(), before, strict=True):
        assert torch.equal(key[:, :2], old_key[:, :2])
        assert torch.equal(value[:, :2], old_value[:, :2])
        assert not torch.equal(key[:, 2:], old_key[:, 2:])


def test_only_the_chosen_layers_get_a_prefix() -> None:
    model, rest = make("llama", num_hidden_layers=3), tokens(2, 5)
    handle = prefixcore.attach(model, PrefixTuningConfig(init_text=TEXT, layers=[2, 0]), tokenizer=Tokenizer())
    assert handle.config.layers == [0, 2]
    seen = {}
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *a, i=i: seen.update({i: a[2]["prefixcore_prefixes"]}), with_kwargs=True)
    model(rest)
    assert [seen[i].at(i, rest.device) is not None for i in range(3)] == [True, False, True]
    model(rest, labels=rest).loss.backward()
    assert len(list(handle.parameters())) == 4
    assert all(p.grad.abs().max() > 0 for p in handle.parameters())
