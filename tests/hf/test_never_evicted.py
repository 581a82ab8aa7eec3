"""A prefix is seen at any distance: in layers with a window, or in chunks, when the text is several windows long."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import prefixcore
from prefixcore import PrefixTuningConfig
from prefixcore.hf.attention.mass import watch_mass

from . import tiny_models

WINDOW, LENGTH, P = 12, 40, 3

CLASSES = {
    "Cohere2ForCausalLM": ("cohere2", {"sliding_window": WINDOW}),
    "Exaone4ForCausalLM": ("exaone4", {"sliding_window": WINDOW}),
    "Gemma3ForCausalLM": ("gemma3_text", {"sliding_window": WINDOW}),
    "Gemma3nForCausalLM": ("gemma3n_text", {"sliding_window": WINDOW, "vocab_size_per_layer_input": 128}),
    "Gemma4ForCausalLM": ("gemma4_text", {"sliding_window": WINDOW}),
    "GptOssForCausalLM": ("gpt_oss", {"sliding_window": WINDOW}),
    "Llama4ForCausalLM": ("llama4_text", {"attention_chunk_size": WINDOW}),
    "MistralForCausalLM": ("mistral", {"sliding_window": WINDOW}),
    "Olmo3ForCausalLM": ("olmo3", {"sliding_window": WINDOW}),
    "RecurrentGemmaForCausalLM": ("recurrent_gemma", {"attention_window_size": WINDOW}),
}

each_class = pytest.mark.parametrize("name", CLASSES)


def attached(name: str) -> tuple[Any, prefixcore.Handle]:
    model_type, window = CLASSES[name]
    model = tiny_models.make(name, model_type, **window)
    return model, prefixcore.attach(model, PrefixTuningConfig(P, init="random", seed=0))


@each_class
def test_the_last_of_many_tokens_sees_it_in_every_layer(name: str) -> None:
    """The share of attention that falls on the prefix, of each layer by itself."""
    model, handle = attached(name)
    with torch.no_grad(), watch_mass() as masses:
        model(torch.arange(3, 3 + LENGTH)[None], use_cache=False)
    assert set(masses) == set(range(len(handle.module.layers)))
    for mass in masses.values():  # [B, T]
        assert mass[0, -1] > 1e-3


@each_class
def test_generate_goes_on_seeing_it(name: str) -> None:
    """With the cache of the class, whose windows hold no prefix, logits are those of a forward without one."""
    model, _ = attached(name)
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    output = model.generate(torch.arange(3, 11)[None], output_logits=True, return_dict_in_generate=True, **options)
    with torch.no_grad():
        expected = model(output.sequences[:, :-1], use_cache=False).logits[0, -24:]
        with prefixcore.hf.attached(model).disabled():
            bare = model(output.sequences[:, :-1], use_cache=False).logits[0, -24:]
    got = torch.stack(output.logits)[:, 0]
    assert (expected - bare).norm() > 0.05 * bare.norm()  # also of the last, which stands windows away
    assert (expected[-1] - bare[-1]).norm() > 0.01 * bare[-1].norm()
    assert (got - expected).norm() < 1e-3 * expected.norm()
