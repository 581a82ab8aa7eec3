"""Soft prompts on a model whose table of embeddings is quantised, so that no kernel reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import prefixcore
from tests import tiny
from tests.adapters.quantized import quantize

IDS = torch.tensor([[5, 6, 7, 8]])
CONFIGS = {
    "before the text": prefixcore.PromptTuningConfig(num_virtual_tokens=3, seed=0),
    "in the text": prefixcore.PromptTuningConfig(num_virtual_tokens=2, virtual_token_ids=[5, 7], seed=0),
    "PTuning": prefixcore.PTuningConfig(num_virtual_tokens=3, seed=0),
}


def quantized(model: Any) -> Any:
    quantize(model, modules=torch.nn.Embedding)
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_soft_prompt_stands_before_what_the_quantised_table_says(config: Any, tmp_path: Path) -> None:
    model = quantized(tiny.model())
    table = model.get_input_embeddings().weight.dequantize()
    with prefixcore.attach(model, config) as handle:
        logits = model(IDS).logits
        model(IDS, labels=IDS).loss.backward()
        assert any(parameter.grad.abs().sum() > 0 for parameter in handle.parameters())
        assert model.generate(IDS, max_new_tokens=2, min_new_tokens=2).shape == (1, 6)
        handle.save(tmp_path / "adapter")
    plain = tiny.model()
    plain.get_input_embeddings().weight.data.copy_(table)
    with prefixcore.load(plain, tmp_path / "adapter"):
        torch.testing.assert_close(plain(IDS).logits, logits, rtol=1e-5, atol=1e-6)


def test_one_of_peft_is_accelerated() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = quantized(tiny.model())
    model.get_input_embeddings().weight.requires_grad_(False)
    torch.manual_seed(0)
    peft_model = peft.get_peft_model(model, config)
    expected = peft_model(input_ids=IDS).logits
    with prefixcore.accelerate(peft_model):
        torch.testing.assert_close(peft_model(input_ids=IDS).logits, expected)
