"""Training with packed batches: the same losses and values as with padded ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig
from prefixcore.training import Example, TokenizedExample, TrainingOptions, held_out_loss, tokenize, train
from tests import tiny

TEXTS = [("the cat", " sat"), ("a", " b c d e f"), ("one two three four", " five"), ("x", " y"), ("to be or", " not")]


def rows() -> list[TokenizedExample]:
    return tokenize(tiny.tokenizer(), [Example(*text) for text in TEXTS], end="\n")


def attach(config: Any = None) -> tuple[prefixcore.Handle, list[set[str]]]:
    """A handle, and the names of the arguments of every call of its model."""
    handle = prefixcore.attach(tiny.model(), config or PrefixTuningConfig(num_virtual_tokens=4, init="random", seed=3))
    calls: list[set[str]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        calls.append(set(kwargs))

    handle.model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)  # as the caller gives them
    return handle, calls


@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
def test_the_same_is_learnt_packed_and_padded(kind):
    options = TrainingOptions(steps=12, batch_size=2, learning_rate=1e-2, eval_every=4)
    records, values = [], []
    for packed in (None, False):
        handle, calls = attach(kind(num_virtual_tokens=4, init="random", seed=0))
        records.append(train(handle, tiny.tokenizer(), rows()[:4], held_out=rows()[2:], options=options, packed=packed))
        values.append([p.detach().clone() for p in handle.parameters()])
        assert len(calls) == 12 + 4
        assert all(("cu_seq_lens_q" in call) == (packed is None) for call in calls)
        assert all(("attention_mask" in call) == (packed is False) for call in calls)
    one, other = records
    losses = [loss for _, loss in one.train_loss]
    assert losses == pytest.approx([loss for _, loss in other.train_loss], rel=1e-5)
    assert [loss for _, loss in one.held_out_loss] == pytest.approx([x for _, x in other.held_out_loss], rel=1e-5)
    assert sum(losses[-2:]) < sum(losses[:2])  # the last epoch, the first one
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_held_out_loss_is_the_same_packed_and_padded(batch_size):
    handle, _ = attach()
    expected = held_out_loss(handle.model, rows(), 0)
    assert held_out_loss(handle.model, rows(), 0, batch_size=batch_size, packed=True) == pytest.approx(expected, 1e-5)
