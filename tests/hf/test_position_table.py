"""The limit of positions is found in any family that has one, and said in words at attach and at the call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig
from prefixcore.hf.positions.position_table import position_limit

from .tiny_models import every_class, make

LIMITS = {  # 96 positions each, some behind an offset or a row for padding
    "BartForCausalLM": 96,
    "BioGptForCausalLM": 96,
    "CodeGenForCausalLM": 96,
    "CTRLLMHeadModel": 96,
    "GPT2LMHeadModel": 96,
    "GPTBigCodeForCausalLM": 96,
    "GPTJForCausalLM": 96,
    "GPTNeoForCausalLM": 96,
    "MptForCausalLM": 96,
    "OPTForCausalLM": 96,
    "OpenAIGPTLMHeadModel": 96,
    "ProphetNetForCausalLM": 94,
    "RobertaForCausalLM": 95,
}
NONE = ["BloomForCausalLM", "FalconForCausalLM", "LlamaForCausalLM", "XGLMForCausalLM", "XLNetLMHeadModel"]

pytestmark = pytest.mark.filterwarnings("ignore:.*not among the families", "ignore:.*drops no weights")


def model_of(name: str) -> Any:
    return make(name, every_class()[name], is_decoder=True)


@pytest.mark.parametrize("name", LIMITS)
def test_it_is_where_the_model_ends(name: str) -> None:
    model, limit = model_of(name), LIMITS[name]
    assert position_limit(model) == limit
    with torch.no_grad():
        model(input_ids=torch.full((1, limit), 60), use_cache=False)
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model(input_ids=torch.full((1, limit + 1), 60), use_cache=False)


@pytest.mark.parametrize("name", NONE)
def test_there_is_none(name: str) -> None:
    model = model_of(name)
    assert position_limit(model) is None
    with torch.no_grad():
        model(input_ids=torch.full((1, 200), 60), use_cache=False)


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
@pytest.mark.parametrize("name", ["BioGptForCausalLM", "GPTBigCodeForCausalLM", "OPTForCausalLM"])
def test_it_is_said_in_words(name: str, config: Any) -> None:
    model = model_of(name)
    with pytest.raises(ValueError, match="96 virtual tokens leave no room"):
        prefixcore.attach(model, config(num_virtual_tokens=96, init="zero"))
    prefixcore.attach(model, config(num_virtual_tokens=6, init="zero"))
    with torch.no_grad():
        assert model(input_ids=torch.full((1, 90), 60)).logits.shape[1] == 90
        with pytest.raises(ValueError, match="learned 96 positions, but this input needs 97"):
            model(input_ids=torch.full((1, 91), 60))


@pytest.mark.parametrize("name", ["CodeGenForCausalLM", "CTRLLMHeadModel", "GPTJForCausalLM", "GPTNeoForCausalLM"])
def test_a_soft_prompt_on_tables_of_other_kinds(name: str) -> None:
    model = model_of(name)
    prefixcore.attach(model, PromptTuningConfig(num_virtual_tokens=6, init="zero"))
    with torch.no_grad():
        model(input_ids=torch.full((1, 90), 60))
        with pytest.raises(ValueError, match="learned 96 positions, but this input needs 97"):
            model(input_ids=torch.full((1, 91), 60))
