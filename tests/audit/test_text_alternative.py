"""Written prompts: no text is scored on what it shows, and scores are those of an evaluation."""

from __future__ import annotations

import pytest

from prefixcore.audit.candidates import Candidate, divide, with_text, written_candidates
from prefixcore.audit.search import search
from prefixcore.audit.text_alternative import compare, text_alternative
from prefixcore.training import Example, evaluate, held_out_loss, tokenize

from .conftest import EXAMPLES


def test_probes_that_are_shown_are_not_scored(probes):
    division = divide(probes, None)
    assert division.from_probes
    assert len(division.shown) == 4  # a third of twelve
    shown = {example.prompt for example in division.shown}
    assert all(probes.examples[i].prompt not in shown for i in division.scored)
    assert len(division.scored) == 8


def test_examples_that_are_probes_are_left_out(probes):
    others = [Example("zz ->", " zz"), EXAMPLES[0], Example(EXAMPLES[1].prompt, " another answer")]
    division = divide(probes, others)
    assert division.shown == others[:1]
    assert division.left_out == 2
    assert division.scored == list(range(12))


@pytest.mark.parametrize("end", ["\n", None, "."])
def test_candidates_show_whole_examples(end):
    shown = [Example(f"{i} ->", f" {i}") for i in range(10)]
    found = written_candidates([("instruction", "Say it."), ("its stated task", "Say it.")], shown, end)
    close = end or "\n"
    texts = {each.text: each.shown for each in found}
    assert texts["Say it."] == 0
    assert texts[f"Say it.\n0 -> 0{close}1 -> 1{close}"] == 2
    assert sorted(texts.values()) == [0, 2, 2, 8, 8]  # with the instruction, and without
    assert "" not in texts


def test_scores_are_those_of_an_evaluation(model, tokenizer, probes, quiet):
    division = divide(probes, None)
    rows = [
        {"right_with": i % 2 == 0, "right_without": False, "loss_with": 1.0 + i, "loss_without": 3.0} for i in range(12)
    ]
    candidates = [Candidate("one", "ab -> ba\n"), Candidate("long", "x" * 120), Candidate("two", "swap: ")]
    found = text_alternative(model, tokenizer, probes, division, candidates, rows, "\n", quiet)
    scored = [probes.examples[i] for i in division.scored]
    for entry, candidate in zip(found["candidates"], (candidates[0], candidates[2]), strict=True):
        asked = with_text(scored, candidate.text)
        ids = tokenize(tokenizer, asked, end="\n")
        expected = evaluate(model, tokenizer, asked, ids, end="\n")
        assert entry["share"] == expected.exact_match
        assert entry["loss"] == pytest.approx(held_out_loss(model, ids, 0), rel=1e-4)
        assert entry["tokens"] == len(candidate.text)
    assert [entry["name"] for entry in found["skipped"]] == ["long"]
    assert found["adapter"]["right"] == sum(rows[i]["right_with"] for i in division.scored)
    assert found["adapter"]["loss"] == pytest.approx(sum(rows[i]["loss_with"] for i in division.scored) / 8)


def score(rights, losses=None):
    return {"right": sum(rights), "rights": rights, "loss": sum(losses or [0]), "losses": losses or [0] * len(rights)}


def test_verdicts():
    assert compare(score([1, 1, 0]), score([1, 1, 0]))["verdict"] == "as good"
    assert compare(score([1, 1, 0]), score([1, 0, 0]))["verdict"] == "not told apart"
    assert compare(score([1] * 10), score([0] * 10))["verdict"] == "adapter better"
    assert compare(score([1] * 6, [1.0] * 5 + [3.0]), score([1] * 6, [2.0] * 6))["loss_lower"] == 5
    by_loss = compare(score([0] * 10, [1.0] * 10), score([0] * 10, [2.0] * 10))
    assert by_loss["metric"] == "loss"
    assert by_loss["verdict"] == "adapter better"


def test_a_search_lowers_the_loss_of_its_examples_and_keeps_its_bound(model, tokenizer, quiet, monkeypatch):
    from prefixcore.audit import search as module

    seen = []
    losses = module.losses

    def counted(*arguments):
        value = losses(*arguments)
        seen.append(float(value.double().mean()))
        return value

    monkeypatch.setattr(module, "losses", counted)
    nearest = [[5, 9, 30], [7, 40, 41], [8, 60, 61]]
    text = search(model, tokenizer, nearest, EXAMPLES, end="\n", trials=6, progress=quiet)
    assert len(seen) == 6
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 3
    assert min(seen) < seen[0]
    whole = [
        type(each)([*ids, *each.prompt_ids], each.completion_ids) for each in tokenize(tokenizer, EXAMPLES, end="\n")
    ]
    assert held_out_loss(model, whole, 0) == pytest.approx(min(seen), rel=1e-4)
