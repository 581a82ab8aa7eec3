"""`prefixcore tune`: the best adapter, the table, the command that trains it, and what is refused."""

from __future__ import annotations

import json
import shlex
import signal

import pytest

from prefixcore.adapters import read_adapter, read_record
from prefixcore.training.tuning.halving import _Run


@pytest.fixture
def tune(prefixcore, model_folder, data, tmp_path):
    """`tune(*options)` -> (exit code, standard output, standard error)."""

    def call(*options, out=tmp_path / "tuned"):
        base = ["tune", "--model", model_folder, "--data", data, "--out", out, "--end", "\\n", "--minutes", 2]
        return prefixcore(*base, *options)

    return call


@pytest.mark.parametrize("start", [("--init", "vocab"), ()])  # the other: some of the training examples
def test_the_best_is_saved_and_its_command_trains_it_again(tune, prefixcore, tmp_path, start):
    options = ("--method", "prefix", "--lengths", "2,3", "--lrs", "0.00001,0.03", "--most-steps", 14)
    code, out, err = tune(*options, *start, "--license", "CC0-1.0", "--intended-use", "a test")
    assert code == 0, err
    assert "4 candidates, 2 minutes" in err
    assert "4 candidates, 2 steps each" in err
    table, _, command = out.strip().partition("\n\n")
    assert len(table.splitlines()) == 5
    length, rate, rounds, steps, loss, _ = table.splitlines()[1].split()
    assert (rate, rounds, steps) == ("0.03", "3", "14")
    record = read_record(tmp_path / "tuned")
    assert [trial["rung"] for trial in record["tuning"]["trials"]] == [3, 2, 1, 1]
    assert record["held_out"]["after training"]["loss"] == pytest.approx(float(loss), abs=1e-3)
    manifest = read_adapter(tmp_path / "tuned").manifest
    assert manifest.training["learning_rate"] == 0.03
    assert manifest.metrics["loss"] == pytest.approx(float(loss), abs=1e-3)
    assert prefixcore("verify", tmp_path / "tuned")[0] == 0

    arguments = shlex.split(command)
    assert arguments[:2] == ["prefixcore", "train"]
    assert arguments[arguments.index("--num-virtual-tokens") + 1] == length
    code, _, err = prefixcore(*arguments[1:-1], tmp_path / "trained")
    assert code == 0, err
    again = read_record(tmp_path / "trained")
    assert [x for _, x in again["train_loss"]] == pytest.approx([x for _, x in record["train_loss"]], rel=1e-4)


def test_lengths_go_by_the_text_and_rates_by_the_method(tune, tmp_path):
    code, out, err = tune("--method", "prompt", "--init-text", "ab -> ba", "--most-steps", 1)
    assert code == 0, err
    rows = [line.split()[:2] for line in out.split("\n\n")[0].splitlines()[1:]]
    assert {length for length, _ in rows} == {"4", "8", "16"}
    assert {rate for _, rate in rows} == {"0.0015", "0.005", "0.015", "0.05"}


def test_the_command_gives_back_a_text_that_begins_with_a_dash(tune, prefixcore, tmp_path):
    code, out, err = tune("--method", "prompt", "--init-text=- ab\\n", "--most-steps", 1)
    assert code == 0, err
    arguments = shlex.split(out.strip().splitlines()[-1])
    assert "--init-text=- ab\\n" in arguments
    code, _, err = prefixcore(*arguments[1:-1], tmp_path / "trained")
    assert code == 0, err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "prefix", "--minutes", 0), "--minutes must be a finite number above 0"),
        (("--method", "prefix", "--eval-fraction", 0), "tuning goes by held-out examples, and there are none"),
        (("--method", "prefix", "--lengths", "2", "--num-virtual-tokens", 3), "say the same"),
        (("--method", "prefix", "--lrs", "a"), "expected numbers with commas"),
        (("--method", "prompt", "--layers", "1"), "--layers is for --method prefix"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_opened(tune, tmp_path, monkeypatch, options, said):
    monkeypatch.setattr("prefixcore.cli.tune.open_model", lambda arguments: 1 / 0)
    code, out, err = tune(*options)
    assert (code, out) == (2, "")
    assert said in err
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize(("option", "said"), [("--lengths", "whole numbers from 1"), ("--lrs", "finite number above")])
def test_wrong_numbers_are_refused(tune, option, said):
    code, _, err = tune("--method", "prefix", option, "0")
    assert code == 2
    assert said in err


@pytest.mark.parametrize("step", [1, 3, 7])  # in the first round, in the second, and in the last
def test_ctrl_c_saves_the_best_so_far(tune, tmp_path, monkeypatch, step):
    real = _Run._step

    def interrupted(self, alive) -> None:
        real(self, alive)
        if self.steps == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(_Run, "_step", interrupted)
    options = ("--method", "prefix", "--lengths", "2", "--lrs", "0.001,0.01,0.02,0.03", "--most-steps", 14)
    code, out, err = tune(*options)
    assert code == 130, err
    record = json.loads((tmp_path / "tuned" / "training.json").read_text())
    assert record["interrupted"]
    assert len(record["train_loss"]) == step
    assert "prefixcore train" in out


def test_ctrl_c_before_the_first_step_saves_nothing(tune, tmp_path, monkeypatch):
    real = _Run._evaluate

    def interrupted(self, alive) -> None:
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        real(self, alive)

    monkeypatch.setattr(_Run, "_evaluate", interrupted)
    code, out, err = tune("--method", "prefix", "--lengths", "2", "--lrs", "0.01", "--most-steps", 3)
    assert (code, out) == (130, "")
    assert "stopped before the first step; nothing was saved" in err
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ("1e38", "no step of the best candidate brought its held-out loss below 4.615"),
        ("1e30", "its learning rate 1e+30 is too large: try lower ones"),
        ("0.01,0.01", None),
    ],
)
def test_a_best_candidate_that_is_worth_nothing_is_said_to_be(tune, rates, said):
    code, _, err = tune("--method", "prefix", "--lengths", "2", "--lrs", rates, "--most-steps", 3)
    assert code == 0, err
    assert "1 candidate, 2 minutes" in err
    assert ("warning" in err) == (said is not None)
    assert said is None or said in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--lengths", "2,1000"), "1,000 virtual tokens leave no room for an example"),
        (("--lengths", "2,4", "--num-frozen-tokens", 3), "--lengths and --lrs: num_frozen_tokens is 3 of 2"),
    ],
)
def test_a_length_that_cannot_be_is_named(tune, options, said):
    code, _, err = tune("--method", "prefix", *options)
    assert (code, said in err) == (2, True), err


def test_the_command_starts_as_the_candidate_did_where_examples_are_left_out(tune, prefixcore, data, tmp_path):
    """A start is made of training examples; which those are does not depend on what is too long."""
    lines = data.read_text().splitlines()
    lines[::3] = [json.dumps({"prompt": f"{'q' * 60}{i} ->", "completion": " z"}) for i in range(len(lines[::3]))]
    longer = tmp_path / "longer.jsonl"  # the fixture's own file is every test's
    longer.write_text("\n".join(lines) + "\n")
    options = ("--data", longer, "--method", "prefix", "--lengths", "12", "--lrs", "0.01", "--most-steps", 3)
    code, out, err = tune(*options, "--max-length", 30, "--skip-too-long")
    assert code == 0, err
    assert "left out" in err
    arguments = shlex.split(out.strip().split("\n\n")[1])
    assert prefixcore(*arguments[1:-1], tmp_path / "trained")[0] == 0
    found = [read_record(tmp_path / name)["train_loss"] for name in ("tuned", "trained")]
    assert [x for _, x in found[0]] == pytest.approx([x for _, x in found[1]], rel=1e-4)
