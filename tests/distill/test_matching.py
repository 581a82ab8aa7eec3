"""Keys and values fitted to what queries are answered behind the text."""

from __future__ import annotations

import pytest
import torch

from prefixcore.audit.running import FrozenRun
from prefixcore.audit.virtual import VirtualTokens
from prefixcore.distill import Prompt
from prefixcore.distill import reads as reads_module
from prefixcore.distill import start as start_module
from prefixcore.distill.front import Front
from prefixcore.distill.matching import fitted, heaviest_of_each_head, least_squares
from prefixcore.distill.reads import Row, answered, reads_of
from prefixcore.distill.start import starting_values
from prefixcore.distill.targets import Target
from prefixcore.distill.writing import Asked
from prefixcore.hf import attach
from prefixcore.hf.positions.rotary import turn
from prefixcore.nn import PrefixTuningConfig
from prefixcore.ops import prefix_attention

IDS = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
ROWS = [[20 + i, 30 + i, 41, 52 - i, 60] for i in range(8)]


def alike(rows):
    """Requests that are what the teacher reads."""
    return [Row(row, row) for row in rows]


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
    virtual = VirtualTokens(len(IDS), tuple(range(len(IDS))), dict(enumerate(front.pairs)))
    FrozenRun(model)(torch.tensor([ROWS[0]]), virtual=virtual, watch=lambda call: calls.update({call.layer: call}))
    for layer, reads in enumerate(reads_of(model, front.pairs, alike(ROWS[:1]))):
        call = calls[layer]
        expected = prefix_attention(call.query, call.key, call.value, *call.prefix, **call.options)
        heads = call.key.shape[1]
        torch.testing.assert_close(reads.output, expected[0].reshape(heads, -1, expected.shape[-1]))


def test_all_tokens_answer_as_the_text(model, front):
    for reads, (key, value) in zip(reads_of(model, front.pairs, alike(ROWS)), front.pairs, strict=True):
        assert error(reads, *fitted(reads, key, value, len(IDS), steps=0)) < 1e-6


def test_each_step_of_the_fit_brings_it_nearer(model, front):
    for reads, (key, value) in zip(reads_of(model, front.pairs, alike(ROWS)), front.pairs, strict=True):
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
    monkeypatch.setattr(reads_module, "MOST_READ", 12)
    long = list(range(20, 60))
    groups = 2  # query heads for each key-value head
    for rows, tokens in (([ROWS[0], long, ROWS[1]], 12), ([long], 12), (ROWS[:2], 10)):
        assert {reads.query.shape[1] for reads in reads_of(model, front.pairs, alike(rows))} == {groups * tokens}
    cut = reads_of(model, front.pairs, alike([ROWS[0], long]))
    whole = reads_of(model, front.pairs, alike([ROWS[0], long[:7]]))
    for a, b in zip(cut, whole, strict=True):
        torch.testing.assert_close(a.output, b.output)


def test_a_head_whose_queries_are_zero(model):
    """As pruning leaves one; there is no direction that makes a key heavier for it."""
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    pruned = Front.of(model, IDS)
    for reads, (key, value) in zip(reads_of(model, pruned.pairs, alike(ROWS)), pruned.pairs, strict=True):
        found = fitted(reads, key, value, 3)
        assert all(x.isfinite().all() for x in found)
        assert error(reads, *found) < 1


BEFORE = [[3], [3, 50, 51, 52, 60, 61], list(range(30, 50))]
"""What stands before the words of a request: a token that begins every text, and what a template writes, of six tokens
and of more than the text has."""


@pytest.mark.parametrize("before", BEFORE)
def test_a_request_is_asked_as_it_comes_and_answered_as_the_teacher_is(model, front, before):
    rows = [Row(row, before + row) for row in ROWS[:3]]
    told = reads_of(model, front.pairs, alike(ROWS[:3]))
    # Where the request's words stand as far from the text as the teacher's.
    position = len(IDS) - len(before)
    virtual = VirtualTokens(position, tuple(range(position)), dict(enumerate(front.pairs)))
    calls = []
    for row in rows:
        FrozenRun(model)(torch.tensor([row.request]), virtual=virtual, watch=calls.append)
    for layer, (reads, teacher) in enumerate(zip(reads_of(model, front.pairs, rows), told, strict=True)):
        own = [call for call in calls if call.layer == layer]
        # What stands before the words is read once: [Hkv, G, tokens, D].
        expected = [own[0].query, *(call.query[:, :, len(before) :] for call in own[1:])]
        expected = torch.cat([part[0].unflatten(0, (len(reads.query), -1)).flatten(1, 2) for part in expected], 1)
        torch.testing.assert_close(reads.query, expected * own[0].options["scale"])
        groups = own[0].query.shape[1] // len(reads.query)
        first = reads.output[:, : groups * len(rows[0].request)].unflatten(1, (groups, -1))[:, :, len(before) :]
        torch.testing.assert_close(first, teacher.output[:, : groups * len(ROWS[0])].unflatten(1, (groups, -1)))
        later = groups * 2 * len(ROWS[0])
        torch.testing.assert_close(reads.output[:, -later:], teacher.output[:, -later:])


@pytest.mark.parametrize("before", BEFORE)
def test_a_start_for_requests_answers_them_nearer_to_the_text(model, front, before):
    """Than one for what the teacher reads, and than the whole text's own keys and values do before such a request."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(20, 90, (6,), generator=generator).tolist() for _ in range(48)]
    learnt, held_out = rows[:40], torch.tensor(rows[40:])
    requests = torch.cat([torch.tensor(before).expand(8, -1), held_out], 1)
    with torch.no_grad(), attach(model, PrefixTuningConfig(init=front.pairs)):
        expected = model(held_out).logits.log_softmax(-1)

    def away(values):
        with torch.no_grad(), attach(model, PrefixTuningConfig(init=values)):
            found = model(requests).logits[:, len(before) :].log_softmax(-1)
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    def start(before):
        asked = [Asked(Prompt("x"), row[:2], before + row[:2]) for row in learnt]
        targets = [Target(a, r[2:], torch.zeros(0, 1), torch.zeros(0, 1)) for a, r in zip(asked, learnt, strict=True)]
        return starting_values(model, front, 6, "match", targets, front.pairs).values

    found = away(start(before))
    assert found < 0.5 * away(start([]))
    assert found < away(front.pairs)


@pytest.mark.parametrize("before", [[], *BEFORE])
def test_what_is_fitted_stands_as_far_from_the_words_as_the_text_does_from_the_teachers(
    model, front, before, monkeypatch
):
    monkeypatch.setattr(start_module, "fitted", lambda reads, key, value, count: (key[:, -count:], value[:, -count:]))
    targets = [Target(Asked(Prompt("x"), ROWS[0], before + ROWS[0]), [5], torch.zeros(1, 1), torch.zeros(1, 1))]
    found = starting_values(model, front, 4, "match", targets, front.pairs).values
    # The last four of the text stand at 8 to 11 and the teacher's words from 12 on; a request's from 4 + len(before).
    expected = turn(model, [(key[:, -4:], value[:, -4:]) for key, value in front.pairs], 4 + len(before) - 12)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a[0], b[0])


def test_a_request_is_cut_where_there_is_no_more_room(model, front, monkeypatch):
    """Both rows at their ends, so that what they share is still what they share."""
    monkeypatch.setattr(reads_module, "MOST_READ", 8)
    groups = 2
    found = reads_of(model, front.pairs, [Row(row, [3, 4, *row]) for row in ROWS[:3]])
    assert {reads.query.shape[1] for reads in found} == {groups * (2 + 8)}
    whole = reads_of(model, front.pairs, [Row(ROWS[0], [3, 4, *ROWS[0]]), Row(ROWS[1][:3], [3, 4, *ROWS[1][:3]])])
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a.query, b.query)
        torch.testing.assert_close(a.output, b.output)
