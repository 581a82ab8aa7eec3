"""Mixtures of experts: the loss that balances the load of the router sees the tokens that it sees in PEFT.

A prefix is no token and goes through no router; the virtual tokens of a soft prompt do, and padding never does.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import peft
import pytest
import torch

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig

from . import tiny_models

P = 4

CLASSES = {
    "GptOssForCausalLM": "gpt_oss",
    "MixtralForCausalLM": "mixtral",
    "OlmoeForCausalLM": "olmoe",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}

pytestmark = [pytest.mark.parametrize("name", CLASSES), pytest.mark.parametrize("side", ["none", "right"])]


def batch(side: str) -> dict[str, Any]:
    ids = torch.arange(3, 19).view(2, 8)
    mask = torch.ones_like(ids)
    mask[1, 5:] = side != "right"
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def both(name: str, method: str) -> tuple[Any, Any, prefixcore.Handle]:
    model = tiny_models.make(name, CLASSES[name])
    torch.manual_seed(0)
    kind = peft.PrefixTuningConfig if method == "prefix" else peft.PromptTuningConfig
    theirs = peft.get_peft_model(copy.deepcopy(model), kind(task_type="CAUSAL_LM", num_virtual_tokens=P))
    init = theirs.get_prompt_embedding_to_save("default")
    config = PrefixTuningConfig(init=init) if method == "prefix" else PromptTuningConfig(init=init)
    return theirs, model, prefixcore.attach(model, config)


def test_a_prefix_is_no_token(name: str, side: str) -> None:
    """The loss of real tokens' router logits, each from a row by itself. PEFT's raises: its mask counts P."""
    _, model, handle = both(name, "prefix")
    inputs = batch(side)
    got = model(**inputs, output_router_logits=True)
    alone: list[list[torch.Tensor]] = []
    for ids, seen in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        alone.append(list(model(ids[seen][None], output_router_logits=True).router_logits))
    logits = tuple(torch.cat(layer) for layer in zip(*alone, strict=True))
    loss = sys.modules[type(model).__module__].load_balancing_loss_func
    expected = loss(logits, model.num_experts, model.num_experts_per_tok)
    torch.testing.assert_close(got.aux_loss, expected, rtol=1e-5, atol=1e-6)
    check_gradient(got.aux_loss, handle)


def test_a_soft_prompt_is_tokens(name: str, side: str) -> None:
    theirs, model, handle = both(name, "soft prompt")
    expected = theirs(**batch(side), output_router_logits=True)
    got = model(**batch(side), output_router_logits=True)
    torch.testing.assert_close(got.aux_loss, expected.aux_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-6)
    check_gradient(got.aux_loss, handle)


@pytest.mark.parametrize("config", [PrefixTuningConfig(P, seed=0), PromptTuningConfig(P, seed=0)])
def test_a_configuration_that_asks_for_them(name: str, side: str, config: Any) -> None:
    model = tiny_models.make(name, CLASSES[name])
    with prefixcore.attach(model, config):
        expected = model(**batch(side), output_router_logits=True)
    model.config.output_router_logits = True
    with prefixcore.attach(model, config):
        got = model(**batch(side))
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.aux_loss, expected.aux_loss)


def check_gradient(loss: torch.Tensor, handle: prefixcore.Handle) -> None:
    (gradient,) = torch.autograd.grad(loss, [next(iter(handle.parameters()))])
    assert gradient.abs().max() > 0
