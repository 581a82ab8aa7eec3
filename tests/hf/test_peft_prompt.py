"""The same soft prompt in real PEFT and here: logits, loss, gradients and greedy tokens agree in fp32 to 1e-5."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

import prefixcore

from .models import PEFT_PROMPT, make, padded, tokens

P = 5

pytestmark = pytest.mark.usefixtures("prompts_computed")


def with_peft(model: Any, config: Any = None) -> Any:
    torch.manual_seed(3)
    config = config or peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    return peft.get_peft_model(copy.deepcopy(model), config)


def same_prompt(theirs: Any) -> prefixcore.PromptTuningConfig:
    return prefixcore.PromptTuningConfig(init=theirs.get_prompt_embedding_to_save("default"))


@pytest.mark.parametrize("family", PEFT_PROMPT)
@pytest.mark.parametrize("side", ["none", "right"])
def test_logits_loss_gradients(family: str, side: str) -> None:
    """Labels count from the first text token, which the last virtual one predicts."""
    model, batch = make(family), padded(side)
    theirs = with_peft(model)
    handle = prefixcore.attach(model, same_prompt(theirs))
    expected, got = theirs(**batch), model(**batch)
    assert got.logits.shape[1] == batch["input_ids"].shape[1]
    torch.testing.assert_close(got.logits, expected.logits[:, P:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-5)

    expected.loss.backward()
    got.loss.backward()
    reference = theirs.prompt_encoder["default"].embedding.weight.grad
    assert reference.abs().max() > 1e-3
    torch.testing.assert_close(handle.module.embedding.grad, reference, rtol=1e-5, atol=1e-5)
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("prefixcore."))


@pytest.mark.parametrize("family", PEFT_PROMPT)
def test_greedy_tokens(family: str) -> None:
    model, ids = make(family), tokens(2, 7)
    theirs = with_peft(model)
    prefixcore.attach(model, same_prompt(theirs))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("family", PEFT_PROMPT)
def test_left_padding_is_that_of_each_row_alone(family: str) -> None:
    """By design not PEFT's: there, padding stands between prompt and text."""
    model, batch = make(family), padded("left")
    theirs = with_peft(model)
    prefixcore.attach(model, same_prompt(theirs))
    got = model(**batch).logits
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    written = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = batch["input_ids"][row : row + 1, mask]
        expected = theirs(alone).logits[0, P:]
        torch.testing.assert_close(got[row, mask], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(written[row, 9:], model.generate(alone, **options)[0, alone.shape[1] :])


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_p_tuning_by_its_baked_prompt(kind: str) -> None:
    model, batch = make("llama"), padded("right")
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, encoder_reparameterization_type=kind, encoder_hidden_size=24
    )
    theirs = with_peft(model, config).eval()
    with prefixcore.attach(model, same_prompt(theirs)):
        expected, got = theirs(**batch), model(**batch)
        torch.testing.assert_close(got.logits, expected.logits[:, P:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_p_tuning_by_its_encoder(kind: str) -> None:
    """The encoder itself, with PEFT's weights: the same gradients."""
    model, batch = make("llama"), padded("right")
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, encoder_reparameterization_type=kind, encoder_hidden_size=24
    )
    theirs = with_peft(model, config)
    ours = prefixcore.PTuningConfig(
        num_virtual_tokens=P, init="random", encoder_reparameterization_type=kind, encoder_hidden_size=24
    )
    handle = prefixcore.attach(model, ours)
    handle.module.reparameterization.load_state_dict(theirs.prompt_encoder["default"].state_dict())
    expected, got = theirs(**batch), model(**batch)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-5)
    expected.loss.backward()
    got.loss.backward()
    reference = dict(theirs.prompt_encoder["default"].named_parameters())
    for name, parameter in handle.module.reparameterization.named_parameters():
        torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=1e-4, atol=1e-6)
