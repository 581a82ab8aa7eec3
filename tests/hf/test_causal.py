"""A model that generates, but whose text is not causal, is refused at attach, with what makes it a decoder."""

from __future__ import annotations

import pytest
import torch

import prefixcore

from .tiny_models import make

NAMES = {"BertLMHeadModel": "bert", "ElectraForCausalLM": "electra", "RoFormerForCausalLM": "roformer"}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", NAMES)
def test_a_soft_prompt_on_an_encoder_with_a_causal_head_is_refused(name: str) -> None:
    model = make(name, NAMES[name])
    with pytest.raises(NotImplementedError, match="a later token changes an earlier logit.*is_decoder=True"):
        prefixcore.attach(model, prefixcore.PromptTuningConfig(3, seed=0))
    assert not hasattr(model, "prefixcore")
    with pytest.raises(NotImplementedError, match="not causal|out of|interface"):
        prefixcore.attach(model, prefixcore.PrefixTuningConfig(3, seed=0))


def test_a_prefix_is_refused_with_the_same_hint() -> None:
    with pytest.raises(NotImplementedError, match="is not causal.*is_decoder=True"):
        prefixcore.attach(make("BertLMHeadModel", "bert"), prefixcore.PrefixTuningConfig(3, seed=0))


def test_a_small_change_of_earlier_logits_is_one() -> None:
    """Weights are small: what a later token changes before it is a few thousandths of what it does."""
    model = make("BertLMHeadModel", "bert", initializer_range=0.01)
    for config in (prefixcore.PrefixTuningConfig(3, seed=0), prefixcore.PromptTuningConfig(3, seed=0)):
        with pytest.raises(NotImplementedError, match="is_decoder=True"):
            prefixcore.attach(model, config)


@pytest.mark.parametrize("name", NAMES)
def test_as_a_decoder_it_generates_the_same_with_a_cache_and_without(name: str) -> None:
    model = make(name, NAMES[name], is_decoder=True)
    prefixcore.attach(model, prefixcore.PromptTuningConfig(3, seed=0))
    ids = torch.tensor([[11, 58, 33, 70, 22]])
    cached, uncached = (
        model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(cached, uncached)


def test_an_encoder_that_does_not_generate_is_attached() -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForTokenClassification(config).eval()
    with prefixcore.attach(model, prefixcore.PromptTuningConfig(3, seed=0)) as handle:
        assert handle.is_attached
