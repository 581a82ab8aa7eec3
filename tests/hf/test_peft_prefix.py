"""The same prefix in real PEFT and here: logits, loss, gradients and greedy tokens agree in fp32 to 1e-5."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

import prefixcore
from prefixcore.nn import join_layers

from .models import PEFT_PREFIX, make, padded, tokens

P = 5


def with_peft(model: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, **options)
    return peft.get_peft_model(copy.deepcopy(model), config)


def same_prefix(theirs: Any) -> prefixcore.PrefixTuningConfig:
    return prefixcore.PrefixTuningConfig(init=theirs.get_prompt_embedding_to_save("default"))


def gradient(handle: prefixcore.Handle) -> torch.Tensor:
    """In PEFT's layout."""
    return join_layers([(layer.key.grad, layer.value.grad) for layer in handle.module.layers])


@pytest.mark.parametrize("family", PEFT_PREFIX)
@pytest.mark.parametrize("side", ["none", "right"])
def test_logits_loss_gradients(family: str, side: str) -> None:
    model, batch = make(family), padded(side)
    theirs = with_peft(model)
    handle = prefixcore.attach(model, same_prefix(theirs))
    expected, got = theirs(**batch), model(**batch)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-5)

    expected.loss.backward()
    got.loss.backward()
    reference = theirs.prompt_encoder["default"].embedding.weight.grad
    assert reference.abs().max() > 1e-3
    torch.testing.assert_close(gradient(handle), reference, rtol=1e-5, atol=1e-5)
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("prefixcore."))


@pytest.mark.parametrize("family", PEFT_PREFIX)
def test_left_padding_with_positions(family: str) -> None:
    """PEFT's prefix stands apart from a text that is padded on the left, unless it is told the positions."""
    model, batch = make(family), padded("left")
    theirs = with_peft(model)
    prefixcore.attach(model, same_prefix(theirs))
    seen = batch["attention_mask"].bool()
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    got = model(**batch).logits
    mask = torch.cat((torch.ones(3, P, dtype=torch.long), batch["attention_mask"]), 1)
    past = theirs.get_prompt(3)
    expected = theirs.base_model(
        batch["input_ids"], attention_mask=mask, position_ids=positions + P, past_key_values=past
    ).logits
    torch.testing.assert_close(got[seen], expected[seen], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(**batch, position_ids=positions).logits[seen], got[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", PEFT_PREFIX)
def test_without_a_mask(family: str) -> None:
    model, ids = make(family), tokens(2, 7)
    theirs = with_peft(model)
    prefixcore.attach(model, same_prefix(theirs))
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", PEFT_PREFIX)
@pytest.mark.parametrize("side", ["none", "left"])
def test_greedy_tokens(family: str, side: str) -> None:
    model, batch = make(family), padded(side)
    del batch["labels"]
    theirs = with_peft(model)
    prefixcore.attach(model, same_prefix(theirs))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**batch, **options), theirs.generate(**batch, **options))


def test_mistral_within_its_window() -> None:
    """While prefix and text fit the window together, PEFT sees the whole prefix too."""
    model, batch = make("mistral", sliding_window=P + 9), padded("right")
    theirs = with_peft(model)
    prefixcore.attach(model, same_prefix(theirs))
    torch.testing.assert_close(model(**batch).logits, theirs(**batch).logits, rtol=1e-5, atol=1e-5)


def test_mistral_beyond_its_window() -> None:
    """PEFT's prefix leaves the window with the text; ours is always seen. They part where that begins."""
    window = 8
    model, ids = make("mistral", sliding_window=window), tokens(2, 9)
    theirs = with_peft(model)
    prefixcore.attach(model, same_prefix(theirs))
    difference = (model(ids).logits - theirs(ids).logits).abs().amax((0, 2))
    # The query at text position t stands at P + t and sees positions above P + t - window: all of them up to here.
    whole = window - P
    assert difference[:whole].max() < 1e-5
    assert difference[whole:].min() > 1e-3


def test_projection_agrees_and_runs_once_a_forward() -> None:
    """The MLP: its baked prefix in PEFT, and PEFT's whole-batch evaluation, give the same gradients."""
    model, batch = make("llama"), padded("right")
    theirs = with_peft(model, prefix_projection=True, encoder_hidden_size=12)
    handle = prefixcore.attach(
        model,
        prefixcore.PrefixTuningConfig(
            num_virtual_tokens=P, init="random", prefix_projection=True, encoder_hidden_size=12
        ),
    )
    encoder = theirs.prompt_encoder["default"]
    mlp = handle.module.reparameterization
    mlp.embedding.load_state_dict(encoder.embedding.state_dict())
    mlp.transform.load_state_dict(encoder.transform.state_dict())
    calls = []
    mlp.register_forward_hook(lambda *_: calls.append(1))

    expected, got = theirs(**batch), model(**batch)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-5)
    expected.loss.backward()
    got.loss.backward()
    for ours, reference in zip(mlp.parameters(), encoder.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-4, atol=1e-6)
    assert len(calls) == 1
