"""Distributions, answers and promoted tokens, one text and one token at a time."""

from __future__ import annotations

import pytest
import torch

import prefixcore
from prefixcore.audit import scoring
from prefixcore.audit.behaviour import behaviour
from prefixcore.audit.promoted import FLOOR, TokenShift
from prefixcore.audit.statistics import sign_test, wilson
from prefixcore.training import evaluate, held_out_loss


@pytest.fixture(params=[1, 2**25], ids=["row by row", "in batches"])
def found(request, model, tokenizer, adapter, probes, quiet, monkeypatch):
    monkeypatch.setattr(scoring, "MOST_NUMBERS", request.param)
    shift = TokenShift()
    with prefixcore.load(model, adapter) as handle:
        return behaviour(handle, tokenizer, probes, "\n", quiet, shift), shift.to_dict(tokenizer)


def distributions(model, text):
    """The log-probabilities at each completion token."""
    with torch.no_grad():
        logits = model(torch.tensor([[*text.prompt_ids, *text.completion_ids]])).logits[0]
    first = len(text.prompt_ids) - 1
    return torch.log_softmax(logits[first : first + len(text.completion_ids)], -1)


def test_divergence_and_loss(found, model, adapter, probes):
    without = [distributions(model, text) for text in probes.ids]
    with prefixcore.load(model, adapter):
        after = [distributions(model, text) for text in probes.ids]
        loss = held_out_loss(model, probes.ids, 0)
    rows, summary = found[0]["rows"], found[0]["summary"]
    for row, a, b in zip(rows, after, without, strict=True):
        kl = torch.nn.functional.kl_div(b, a, log_target=True, reduction="none").sum(1)
        assert row["kl_first"] == pytest.approx(float(kl[0]), rel=1e-3, abs=1e-5)
        assert row["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-5)
    assert summary["loss_with"] == pytest.approx(loss, rel=1e-4)
    assert summary["loss_without"] == pytest.approx(held_out_loss(model, probes.ids, 0), rel=1e-4)
    assert summary["kl_first"] > 0.1


def test_answers_are_those_of_an_evaluation(found, model, tokenizer, adapter, probes):
    rows, summary = found[0]["rows"], found[0]["summary"]
    bare = evaluate(model, tokenizer, probes.examples, probes.ids, end="\n")
    with prefixcore.load(model, adapter):
        learned = evaluate(model, tokenizer, probes.examples, probes.ids, end="\n")
    assert [row["answer_without"] for row in rows] == bare.answers
    assert [row["answer_with"] for row in rows] == learned.answers
    assert summary["right_share_with"] == learned.exact_match
    changed = sum(a != b for a, b in zip(bare.answers, learned.answers, strict=True))
    assert summary["changed"] == changed
    assert changed


def test_promoted_tokens(found, model, adapter, probes, tokenizer):
    before = [distributions(model, text) for text in probes.ids]
    with prefixcore.load(model, adapter):
        after = [distributions(model, text) for text in probes.ids]
    for where, pick in (("first", lambda x: x[:1]), ("all", lambda x: x)):
        a, b = torch.cat([pick(x) for x in after]), torch.cat([pick(x) for x in before])
        difference, listed = (a - b).mean(0), torch.maximum(a.exp().mean(0), b.exp().mean(0)) >= FLOOR
        expected = [i for i in difference.argsort(descending=True).tolist() if listed[i] and difference[i] > 0]
        shown = found[1][where]
        assert [row["id"] for row in shown["promoted"]] == expected[:15]
        assert shown["promoted"][0]["difference"] == pytest.approx(float(difference.max()), rel=1e-3)
        falling = [i for i in difference.argsort().tolist() if listed[i] and difference[i] < 0]
        assert [row["id"] for row in shown["suppressed"]] == falling[:15]
        gain = (a.exp() - b.exp()).mean(0).masked_fill(~listed, 0)
        assert shown["gained"][0]["id"] == int(gain.argmax())
        assert shown["lost"][0]["id"] == int(gain.argmin())
        assert shown["places"] == len(a)


@pytest.mark.parametrize(("right", "total"), [(29, 45), (1, 3), (0, 20), (20, 20)])
def test_an_interval_ends_where_the_share_would_just_be_unlikely(right, total):
    """Its ends solve `(right / total - p)^2 = z^2 p (1 - p) / total`, by which it is defined."""
    for end in wilson(right, total):
        if end not in (0.0, 1.0):
            assert (right / total - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / total)
    assert wilson(0, 20)[0] == 0.0
    assert wilson(20, 20)[1] == 1.0


def test_the_sign_test_counts_coin_tosses():
    assert sign_test([1, 1, 0], [1, 1, 0]) == 1.0
    assert sign_test([1] * 5, [0] * 5) == 2 / 2**5
    assert sign_test([1] * 9 + [0], [0] * 9 + [1]) == 2 * (1 + 10) / 2**10
    assert sign_test([0] * 9 + [1], [1] * 9 + [0]) == sign_test([1] * 9 + [0], [0] * 9 + [1])
