"""Models of no known family: out of reach, attached after a check, or by one of the two methods alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig
from prefixcore.hf import FAMILIES as KNOWN
from prefixcore.hf.bank import prefix_calls

from . import tiny_models
from .models import VOCABULARY, Tokenizer, assert_same, make, padded, state, tokens


def _bloom() -> Any:
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    return transformers.BloomForCausalLM(config)


def _gptj() -> Any:
    config = transformers.GPTJConfig(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4
    )
    return transformers.GPTJForCausalLM(config)


def _mamba() -> Any:
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    return transformers.MambaForCausalLM(config)


def _gpt() -> Any:
    config = transformers.OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return transformers.OpenAIGPTLMHeadModel(config)


def _inkling() -> Any:
    if not hasattr(transformers, "InklingForCausalLM"):
        pytest.skip("this transformers has no Inkling")
    return tiny_models.make("InklingForCausalLM", "inkling_text")


REFUSED_MODELS = [
    (_gpt, "has no attention that a prefix reaches: nothing in it calls transformers' attention interface"),
    (_mamba, "has no attention that a prefix reaches: nothing in it calls transformers' attention interface"),
    (_inkling, "a bias to its scores that it computes from the text"),
]


@pytest.mark.parametrize(("maker", "message"), REFUSED_MODELS)
def test_a_model_out_of_reach_is_left_untouched(maker: Any, message: str) -> None:
    torch.manual_seed(0)
    model = maker().train()
    before = state(model)
    with pytest.raises(NotImplementedError, match=message) as caught:
        prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=3, init="zero"))
    assert "llama" in str(caught.value) or maker is _inkling  # says which families are known
    assert_same(before, state(model))


@pytest.mark.parametrize("maker", [_bloom, _gptj])
def test_a_soft_prompt_needs_no_attention_interface(maker: Any) -> None:
    torch.manual_seed(0)
    model, ids = maker().eval(), tokens(2, 6)
    text = Tokenizer()("abc")["input_ids"]
    expected = model(torch.cat((torch.tensor([text, text]), ids), 1)).logits[:, 3:]
    prefixcore.attach(model, PromptTuningConfig(init_text="abc"), tokenizer=Tokenizer())
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


class OtherForCausalLM(transformers.Olmo2ForCausalLM):
    """A class that no table of models names."""


def test_an_unknown_family_is_checked_and_named() -> None:
    torch.manual_seed(0)
    config = transformers.Olmo2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, ids = OtherForCausalLM(config).eval(), tokens(2, 6)
    text = Tokenizer()("abc")["input_ids"]
    expected = model(torch.cat((torch.tensor([text, text]), ids), 1)).logits[:, 3:]
    before = state(model)
    with pytest.warns(UserWarning, match="'olmo2' is not among the families"):
        handle = prefixcore.attach(model, PrefixTuningConfig(init_text="abc"), tokenizer=Tokenizer())
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    handle.detach()
    assert_same(before, state(model))


def test_an_unknown_family_that_fails_the_check_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a Llama whose name is not known and whose positions do not move."""
    model = make("llama")
    before = state(model)
    monkeypatch.setattr("prefixcore.hf.families.FAMILIES", {"gpt2": KNOWN["gpt2"]})
    monkeypatch.setattr(prefix_calls, "shift_positions", lambda *_: None)
    with pytest.raises(NotImplementedError, match="does not act as the text"):
        prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=3, init="zero"))
    assert_same(before, state(model))


@pytest.mark.parametrize("seed", [3, 5])
def test_a_penalty_for_what_was_read_is_no_reason_to_refuse_a_model(seed: int) -> None:
    """Virtual tokens are no ids that the check's generate could give one to, so it may write another token."""
    model = tiny_models.make("SmolLM3ForCausalLM", "smollm3", seed)
    model.generation_config.repetition_penalty = 0.1
    prefixcore.attach(model, PromptTuningConfig(num_virtual_tokens=3))


def _classifier() -> Any:
    return transformers.LlamaForSequenceClassification(make("llama").config)


def test_a_head_that_counts_on_places_takes_a_prefix_but_no_soft_prompt() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    model = transformers.BertForMultipleChoice(transformers.BertConfig(vocab_size=VOCABULARY, **sizes)).eval()
    before = state(model)
    with pytest.raises(NotImplementedError, match="a prefix .* for any head"):
        prefixcore.attach(model, PromptTuningConfig(num_virtual_tokens=3, init="zero"))
    assert_same(before, state(model))
    prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=3, init="random"))


WITHOUT_POOLING = pytest.mark.skipif(
    transformers.__version__.startswith("5.13."),
    reason="transformers 5.13: CamembertForMultipleChoice reads a pooled output that its body has not got",
)


@pytest.mark.parametrize("family", ["Bert", pytest.param("Camembert", marks=WITHOUT_POOLING)])
def test_a_prefix_for_multiple_choice_starts_from_tokens(family: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, pad_token_id=0, **sizes)
    model = getattr(transformers, f"{family}ForMultipleChoice")(config).eval()
    handle = prefixcore.attach(model, PrefixTuningConfig(init_text="abcdef"), tokenizer=Tokenizer())
    start = handle.bake()
    choices = tokens(6, 7).view(2, 3, 7)
    apart = [model(choices[:, i : i + 1]).logits for i in range(3)]
    torch.testing.assert_close(model(choices).logits, torch.cat(apart, 1))
    model(choices, labels=torch.tensor([0, 2])).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in handle.parameters())
    handle.detach()
    with prefixcore.attach(model.base_model, PrefixTuningConfig(init_text="abcdef"), tokenizer=Tokenizer()) as body:
        for pair, expected in zip(start, body.bake(), strict=True):
            torch.testing.assert_close(pair, expected)


def test_a_classifier_takes_a_prefix() -> None:
    torch.manual_seed(0)
    model, batch = _classifier().eval(), padded("right")
    batch["labels"] = torch.tensor([0, 1, 0])
    bare = model(**batch).logits
    handle = prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=3, init="random"))
    out = model(**batch)
    assert not torch.allclose(out.logits, bare)
    out.loss.backward()
    assert all(p.grad.abs().max() > 0 for p in handle.parameters())


def test_a_model_that_reads_no_tokens() -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    model = transformers.ViTModel(config)
    before = state(model)
    with pytest.raises(NotImplementedError, match="reads pixel_values"):
        prefixcore.attach(model, PromptTuningConfig(num_virtual_tokens=3, init="zero"))
    with pytest.raises(ValueError, match="starts from tokens, but ViTModel reads pixel_values"):
        prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=3))
    assert_same(before, state(model))
