"""What a bank refuses says how to go on."""

from __future__ import annotations

from typing import Any

import peft
import pytest
from transformers import LlamaConfig, LlamaForSequenceClassification

import prefixcore
from prefixcore import PrefixTuningConfig, PromptBank, PromptTuningConfig
from prefixcore.adapters import AdapterError

from .models import make


@pytest.mark.parametrize("memory", [-1, "1GB", 1e9, True], ids=str)
def test_memory_is_a_number_of_bytes(memory: Any) -> None:
    with pytest.raises(ValueError, match="memory: expected a number of bytes"):
        PromptBank(make("llama"), memory=memory)


def test_a_second_adapter_is_told_of_the_bank() -> None:
    model = make("llama")
    prefixcore.attach(model, PromptTuningConfig(3))
    with pytest.raises(ValueError, match=r"handle\.detach\(\) first, or make a prefixcore\.PromptBank"):
        prefixcore.attach(model, PromptTuningConfig(3))


def test_a_peft_model_is_told_of_accelerate() -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(TypeError, match=r"prefixcore\.accelerate\(peft_model\)"):
        prefixcore.attach(peft.get_peft_model(make("llama"), config), PrefixTuningConfig(3))


def test_a_head_that_a_task_type_means_is_not_left_out_in_silence() -> None:
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            pad_token_id=0,
        )
    )  # fmt: skip
    bank = PromptBank(model)
    for config in (PrefixTuningConfig(3, task_type="SEQ_CLS"), PromptTuningConfig(3, modules_to_save=["score"])):
        with pytest.raises(NotImplementedError, match=r"score is to be trained along.*modules_to_save=\[\]"):
            bank.attach("a", config)
    bank.attach("a", PrefixTuningConfig(3, task_type="SEQ_CLS", modules_to_save=[]))


def test_the_checkpoint_of_a_bank_says_what_is_in_it(tmp_path: Any) -> None:
    model = make("llama")
    with PromptBank(model) as bank:
        bank.attach("capitals", PrefixTuningConfig(3, seed=0)).save(tmp_path / "prefixcore" / "capitals")
    with pytest.raises(AdapterError, match=r"a bank of .*'capitals'.*: load prefixcore/NAME"):
        prefixcore.load(model, tmp_path)
    prefixcore.load(model, tmp_path / "prefixcore" / "capitals").detach()
