"""Keys and values fitted to what queries are answered behind the text."""

from __future__ import annotations

import pytest
import torch

from prefixcore.distill import Prompt, matching
from prefixcore.distill.front import Front
from prefixcore.distill.matching import answered, fitted, heaviest_of_each_head, least_squares, reads_of
from prefixcore.distill.start import starting_values
from prefixcore.distill.targets import Target
from prefixcore.distill.writing import Asked
from prefixcore.hf import attach
from prefixcore.nn import PrefixTuningConfig
from prefixcore.ops import prefix_attention

IDS = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
ROWS = [[20 + i, 30 + i, 41, 52 - i, 60] for i in range(8)]


def error(reads, key, value):
    """The squared error of the answers as a share of their squares, the mean over the heads."""
    found = answered(reads.query, key, value, reads.rest, reads.rest_output, reads.softcap)
    each = (found - reads.output).square().mean((1, 2)) / reads.output.square().mean((1, 2)).clamp(min=1e-12)
    return float(each.mean())


@pytest.fixture
def front(model):
    return Front.of(model, IDS)


def test_what_is_read_is_attention(model, front):
    """Its two parts, the text's and the rest's, make what the op makes of them together."""
    calls = {}
    from prefixcore.audit.running import FrozenRun
    from prefixcore.audit.virtual import VirtualTokens

    virtual = VirtualTokens(len(IDS), tuple(range(len(IDS))), dict(enumerate(front.pairs)))
    FrozenRun(model)(torch.tensor([ROWS[0]]), virtual=virtual, watch=lambda call: calls.update({call.layer: call}))
    for layer, reads in enumerate(reads_of(model, front.pairs, ROWS[:1])):
        call = calls[layer]
        expected = prefix_attention(call.query, call.key, call.value, *call.prefix, **call.options)
        heads = call.key.shape[1]
        torch.testing.assert_close(reads.output, expected[0].reshape(heads, -1, expected.shape[-1]))


def test_all_tokens_answer_as_the_text(model, front):
    for reads, (key, value) in zip(reads_of(model, front.pairs, ROWS), front.pairs, strict=True):
        assert error(reads, *fitted(reads, key, value, len(IDS), steps=0)) < 1e-6


def test_each_step_of_the_fit_brings_it_nearer(model, front):
    for reads, (key, value) in zip(reads_of(model, front.pairs, ROWS), front.pairs, strict=True):
        chosen = heaviest_of_each_head(reads, key, value, 3)
        solved = (chosen[0], least_squares(reads, *chosen))
        found = fitted(reads, key, value, 3)
        assert error(reads, *found) < 0.8 * error(reads, *solved) < 0.8 * error(reads, *chosen)
        again = fitted(reads, key, value, 3)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_the_model_answers_behind_the_start_as_behind_the_text(model, front):
    """As near as can be with as many virtual tokens as the text has, and nearer than the heaviest with fewer."""
    targets = [Target(Asked(Prompt("x"), row, row), [], torch.zeros(0, 1), torch.zeros(0, 1)) for row in ROWS]
    ids = torch.tensor(ROWS)

    def away(pairs, expected):
        with attach(model, PrefixTuningConfig(init=pairs)):
            return float((model(ids).logits.softmax(-1) - expected).abs().sum(-1).mean())

    with torch.no_grad():
        with attach(model, PrefixTuningConfig(init=front.pairs)):
            expected = model(ids).logits.softmax(-1)
        whole = starting_values(model, front, len(IDS), "match", targets, front.pairs)
        assert (whole.kind, whole.places) == ("match", [])
        assert away(whole.values, expected) < 0.02
        few, heaviest = (starting_values(model, front, 3, kind, targets, front.pairs) for kind in ("match", "mass"))
        assert away(few.values, expected) < 0.5 * away(heaviest.values, expected)


def test_a_long_row_is_read_as_far_as_there_is_room(model, front, monkeypatch):
    """A long prompt takes nothing from those that were read before it, and does not take memory without end."""
    monkeypatch.setattr(matching, "MOST_READ", 12)
    long = list(range(20, 60))
    groups = 2  # query heads for each key-value head
    for rows, tokens in (([ROWS[0], long, ROWS[1]], 12), ([long], 12), (ROWS[:2], 10)):
        assert {reads.query.shape[1] for reads in reads_of(model, front.pairs, rows)} == {groups * tokens}
    cut = reads_of(model, front.pairs, [ROWS[0], long])
    whole = reads_of(model, front.pairs, [ROWS[0], long[:7]])
    for a, b in zip(cut, whole, strict=True):
        torch.testing.assert_close(a.output, b.output)


def test_a_head_whose_queries_are_zero(model):
    """As pruning leaves one; there is no direction that makes a key heavier for it."""
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    pruned = Front.of(model, IDS)
    for reads, (key, value) in zip(reads_of(model, pruned.pairs, ROWS), pruned.pairs, strict=True):
        found = fitted(reads, key, value, 3)
        assert all(x.isfinite().all() for x in found)
        assert error(reads, *found) < 1
