"""Tables, timing in turns, weights shared between copies, and the demo's parts on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch

import prefixcore
from bench import front, models
from bench.demo import __main__ as demo
from bench.demo import methods, prompts, report, task, timing
from prefixcore.training import Evaluation, TrainingOptions, weights_digest
from tests import tiny


def outcome(name, right, answers=("a", "b"), trainable=0):
    return methods.Outcome(name, Evaluation(1.5, right, list(answers)), trainable)


def test_columns_line_up():
    text = report.columns(("", "n"), [["a", "10"], ["long", "1"]])
    assert text.splitlines() == ["       n", "----  --", "a     10", "long   1"]


def test_results_show_the_spread_over_seeds_and_steps_beside_the_bare_model():
    fixed = [outcome(methods.BARE_NAME, 0.0), outcome("written", 0.25)]
    runs = [[outcome(methods.PREFIX_NAME, right, trainable=1234)] for right in (0.5, 0.6)]
    seconds = {methods.BARE_NAME: 0.4, methods.PEFT_NAME: 0.9, methods.PREFIX_NAME: 0.5}
    table = report.results_table(fixed, runs, timing.Timing(seconds, 8, 12, 5, 2))
    lines = [line.split() for line in table.splitlines()[2:]]
    assert lines[0] == ["bare", "model", "0", "%", "1.50", "0", "0.40", "1.00"]
    assert lines[1] == ["written", "25", "%", "1.50", "0", "-", "-"]
    assert lines[2] == ["prefixcore", "prefix", "55", "(50..60)", "%", "1.50", "1,234", "0.50", "1.25"]


def test_right_answers_are_marked():
    split = task.make({"X": "a", "Y": "b", "Z": "c", **task.SHOWN}, held_out=2)
    capitals = [example.completion.strip() for example in split.held_out]
    said = [f" {capitals[0]}", "a very long answer that\ngoes on"]
    lines = report.answers_table(split, [outcome("ours", 0.5, said)]).splitlines()
    assert lines[2].split()[-1] == capitals[0] + "*"
    assert lines[3].endswith("a very long answer ...")
    assert len(report.answers_table(split, [outcome("ours", 0.5, said)], every=2).splitlines()) == 3


def test_steps_take_turns():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = timing.interleave(steps, rounds=4, warmup=2)
    assert [len(values) for values in seconds.values()] == [4, 4, 4]
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert rounds == ["bca", "cab", "abc", "bca", "cab", "abc"]


def test_a_copy_shares_every_weight_and_nothing_else():
    model = tiny.model()
    twin = models.twin(model)
    assert twin is not model
    assert twin.model.layers[0] is not model.model.layers[0]
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert ours is theirs
    ids = torch.tensor([[3, 4, 5]])
    bare = model(ids).logits
    with prefixcore.attach(twin, prefixcore.PrefixTuningConfig(num_virtual_tokens=2, seed=0)):
        assert not torch.equal(twin(ids).logits, bare)
        assert torch.equal(model(ids).logits, bare)


@pytest.fixture
def small(monkeypatch):
    """The task with a few made-up countries, two steps of training, and the tiny model."""
    options = TrainingOptions(steps=2, batch_size=2, eval_every=1)
    monkeypatch.setattr(methods, "PREFIX", options)
    monkeypatch.setattr(methods, "SOFT_PROMPT", options)
    capitals = {f"{letter}land": f"{letter} City" for letter in "ABCDEFGHIJ"}
    return tiny.model(), tiny.tokenizer(), task.make({**capitals, **task.SHOWN}, held_out=5)


def test_all_methods_run_and_leave_the_model_as_it_was(small, tmp_path):
    model, tokenizer, split = small
    before = weights_digest(model)
    announced = []
    outcomes = methods.run_all(model, tokenizer, split, 0, tmp_path, announced.append)
    assert [o.name for o in outcomes] == [methods.PEFT_NAME, methods.SOFT_PROMPT_NAME, methods.PREFIX_NAME]
    assert len(announced) == 3
    length = len(prompts.INSTRUCTION_WITH_EXAMPLES)  # one token a character
    assert outcomes[0].trainable == outcomes[2].trainable == length * 2 * 2 * 2 * 16
    assert outcomes[1].trainable == len(prompts.INSTRUCTION) * 32
    assert all(len(o.evaluation.answers) == 5 for o in outcomes)
    assert weights_digest(model) == before
    assert not hasattr(model, "prefixcore")
    for name in ("prefix", "soft-prompt"):
        prefixcore.load(model, tmp_path / name).detach()


def test_timing_covers_the_bare_model_peft_and_ours(small):
    result = timing.measure(*small, rounds=2, batch_size=3)
    names = [methods.BARE_NAME, methods.PEFT_NAME, methods.PREFIX_NAME, methods.SOFT_PROMPT_NAME]
    assert list(result.seconds) == names
    assert all(value > 0 for value in result.seconds.values())
    assert (result.batch_size, result.rounds) == (3, 2)


def test_the_best_written_prompt_is_chosen_on_training_examples(small, monkeypatch):
    model, tokenizer, split = small
    asked = []

    def predict(model, tokenizer, texts, **options):
        asked.extend(texts)
        good = texts[0].startswith(prompts.WRITTEN["two examples"])
        return [e.completion if good else "no" for e in split.training]

    monkeypatch.setattr(prompts, "predict", predict)
    chosen = prompts.best_written(model, tokenizer, split.training)
    assert (chosen.name, chosen.training_exact_match) == ("two examples", 1.0)
    assert not [text for text in asked for example in split.held_out if example.prompt in text]


def test_the_whole_demo_writes_what_it_says(small, tmp_path, monkeypatch, capsys):
    model, tokenizer, split = small
    monkeypatch.setattr(demo.base_model, "load", lambda: (model, tokenizer))
    monkeypatch.setattr(demo.task, "make", lambda capitals, seed: split)
    out = tmp_path / "results"
    assert demo.main(["--out", str(out), "--seeds", "2", "--seed", "3"]) == 0
    said = capsys.readouterr().out
    for path in (out / "prefix", out / "soft-prompt", out / "curve.png", out / "answers.txt", out / "results.json"):
        assert path.exists()
        assert str(path) in said
    digest = weights_digest(model)
    assert said.count(digest) == 2
    assert "over seeds 3 to 4" in said
    results = json.loads((out / "results.json").read_text())
    assert len(results["runs"]) == 2
    assert len((out / "answers.txt").read_text().splitlines()) == 2 + 5
    assert said.endswith("\n\n" + (out / "summary.txt").read_text())
    assert front.demo(said).splitlines()[2].startswith("| bare model | ")
