"""What `attach` and an attached model refuse, in words and with the model left as it was."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig
from tests import tiny

from .models import assert_same, make, state, tokens

PREFIX = PrefixTuningConfig(num_virtual_tokens=3, init="random", layers=[1])


def _bad_heads() -> Any:
    return PrefixTuningConfig(init=[(torch.zeros(3, 5, 16), torch.zeros(3, 5, 16))] * 2)


REFUSED_CONFIGS = [
    (None, TypeError, "config must be a PrefixTuningConfig"),
    ({"num_virtual_tokens": 3}, TypeError, "got dict"),
    (
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        TypeError,
        "got PrefixTuningConfig of peft: give prefixcore.PrefixTuningConfig the same arguments, or .*accelerate",
    ),
    (PrefixTuningConfig(num_virtual_tokens=3, layers=[0, 2]), ValueError, r"layer 2, but the model has 2 .*\(0 to 1\)"),
    (_bad_heads(), ValueError, r"expected shape \[2, 5, 16\], got \[3, 5, 16\]"),
    (PrefixTuningConfig(init=torch.zeros(5, 7)), ValueError, r"\[P, 128\], got \[5, 7\]"),
    (PrefixTuningConfig(init=torch.full((5, 128), torch.nan)), ValueError, "NaN"),
    (PromptTuningConfig(init=torch.zeros(5, 7)), ValueError, r"expected shape \[5, 32\], got \[5, 7\]"),
    (PrefixTuningConfig(init_text="abc"), ValueError, "needs a tokenizer"),
    (PromptTuningConfig(init_text="abc"), ValueError, "needs a tokenizer"),
    (
        PrefixTuningConfig(num_virtual_tokens=3, init="zero", reparameterization="low_rank", rank=99),
        ValueError,
        "rank 99",
    ),
]


@pytest.mark.parametrize(("config", "error", "message"), REFUSED_CONFIGS)
def test_a_refused_config_leaves_the_model_untouched(config: Any, error: type[Exception], message: str) -> None:
    model = make("llama").train()
    before = state(model)
    with pytest.raises(error, match=message):
        prefixcore.attach(model, config)
    assert_same(before, state(model))


@pytest.mark.parametrize("config", [PrefixTuningConfig(init_text="abc"), PromptTuningConfig(num_virtual_tokens=3)])
def test_the_name_of_a_tokenizer_is_none(config: Any) -> None:
    model = make("llama")
    before, message = state(model), "tokenizer must be a tokenizer or None, got the text 'gpt2'"
    with pytest.raises(TypeError, match=message):
        prefixcore.attach(model, config, tokenizer="gpt2")
    with prefixcore.PromptBank(model) as bank, pytest.raises(TypeError, match=message):
        bank.attach("one", config, tokenizer="gpt2")
    assert_same(before, state(model))


def test_only_transformers_models() -> None:
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        prefixcore.attach(torch.nn.Linear(2, 2), PREFIX)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="attach to the model inside"):
        prefixcore.attach(torch.nn.DataParallel(make("llama")), PREFIX)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got the text 'my-model'; load it: .*AutoModelForCausalLM\.from_pretrained"):
        prefixcore.attach("my-model", PREFIX)  # type: ignore[arg-type]
    pipeline = transformers.pipeline("text-generation", make("llama"), tokenizer=tiny.tokenizer())
    with pytest.raises(TypeError, match=r"got TextGenerationPipeline; give its \.model"):
        prefixcore.attach(pipeline, PREFIX)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got PrefixTuningConfig; give the model first"):
        prefixcore.attach(PREFIX, make("llama"))  # type: ignore[arg-type]


def test_setting_another_attention_afterwards_is_noticed() -> None:
    model, ids = make("llama"), tokens(1, 5)
    handle = prefixcore.attach(model, PREFIX)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="would not be seen"):
        model(ids)
    handle.detach()
    assert model.config._attn_implementation == "sdpa"


def test_attention_weights_are_refused() -> None:
    model, ids = make("llama"), tokens(1, 5)
    handle = prefixcore.attach(model, PREFIX)
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(ids, output_attentions=True)
    handle.detach()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match=r"config\.output_attentions"):
        prefixcore.attach(model, PREFIX)


def test_learned_positions_run_out() -> None:
    """GPT-2 of 64 positions: refused with the numbers, never an index error inside; at the limit it works."""
    model = make("gpt2")
    for config in (
        PrefixTuningConfig(num_virtual_tokens=64, init="zero"),
        PrefixTuningConfig(num_virtual_tokens=64),
        PromptTuningConfig(num_virtual_tokens=64),
    ):
        before = state(model)
        with pytest.raises(ValueError, match="64 virtual tokens leave no room"):
            prefixcore.attach(model, config)
        torch.set_rng_state(before["rng"])
        assert_same(before, state(model))
    for config in (
        PrefixTuningConfig(num_virtual_tokens=10, init="zero"),
        PromptTuningConfig(num_virtual_tokens=10, init="zero"),
    ):
        with prefixcore.attach(model, config):
            assert model(tokens(1, 54)).logits.shape[1] == 54
            with pytest.raises(ValueError, match=r"64 positions.*needs 65.*at most 54 tokens"):
                model(tokens(1, 55))
            with pytest.raises(ValueError, match="needs 65"):
                model.generate(tokens(1, 50), max_new_tokens=20, eos_token_id=None)
            # 60 tokens, but no row of them has more than 50 positions.
            mask = torch.ones(1, 60, dtype=torch.long)
            mask[:, :10] = 0
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            model(tokens(1, 60), attention_mask=mask, position_ids=positions)
