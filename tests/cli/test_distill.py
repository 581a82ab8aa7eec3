"""`prefixcore distill`."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import fields, replace

import pytest
import torch

from prefixcore.adapters import read_adapter
from prefixcore.distill import DistillOptions

TEXT = "ab -> ba\ncd -> dc\nxy -> yx\n"


@pytest.fixture
def context(tmp_path):
    path = tmp_path / "examples.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def distill(prefixcore, model_folder, context, tmp_path):
    """`distill(*options)` -> (exit code, standard output, standard error), the text as four virtual tokens."""

    def call(*options, out=tmp_path / "adapter", context=context, count=4):
        base = ["distill", "--model", model_folder, "--context", context, "--num-virtual-tokens", count, "--out", out]
        return prefixcore(*base, "--steps", 2, "--max-answer-tokens", 4, *options)

    return call


def test_a_text_becomes_an_adapter(distill, prefixcore, model_folder, tmp_path):
    code, out, err = distill("--questions", 40, "--license", "CC-BY-4.0")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split("  ")[0] == "before the prompt"
    names = [re.split(r"  +", line)[0] for line in lines[1:6]]
    assert names == ["the full text", "distilled prefix", "its start", "the text cut to 4", "nothing"]
    assert "each request saves 23 of 27 tokens" in lines[6]
    folder = tmp_path / "adapter"
    assert (folder / "curve.png").is_file()
    code, out, err = prefixcore("inspect", folder, "--json")
    found = json.loads(out)
    assert (code, found["license"], found["num_virtual_tokens"]) == (0, "CC-BY-4.0", 4)
    assert found["settings"]["context"] == "examples.txt"
    assert found["training"]["distilled"]["prompts"]["held_out"] == 8
    code, out, err = prefixcore("generate", "--model", model_folder, "--adapter", folder, "--prompt", "ef ->")
    assert code == 0, err


def test_questions_and_answers_are_kept(distill, tmp_path):
    code, _, err = distill("--questions", 20)
    assert code == 0, err
    kept = sorted((tmp_path / "adapter.distill").iterdir())
    times = [path.stat().st_mtime_ns for path in kept]
    code, _, err = distill("--questions", 20, "--steps", 3)
    assert code == 0, err
    assert sorted((tmp_path / "adapter.distill").iterdir()) == kept
    assert [path.stat().st_mtime_ns for path in kept] == times


def test_prompts_of_ones_own(distill, data, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{a}{b} ->" for a in "klm" for b in "nop"))
    code, out, err = distill("--prompts", prompts, "--eval-prompts", data, "--end", "\\n", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["prompts"] == {"training": 8, "validation": 1, "held_out": 25}
    assert report["scores"]["the full text"]["agreement"] == 1
    assert 0 <= report["scores"]["distilled prefix"]["accuracy"] <= 1
    record = json.loads((tmp_path / "adapter" / "training.json").read_text())
    assert record["end"] == "\n"


def test_what_cannot_be_done_is_one_line_and_nothing_is_written(distill, tmp_path, data):
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\xfa")
    long = tmp_path / "long"
    long.write_text("abc " * 50)
    cases = [
        (distill(context=empty), "empty; expected a text that a prefix is to stand for"),
        (distill(context=binary), "not UTF-8 text"),
        (distill(context=tmp_path / "nowhere"), "no such file"),
        (distill(count=27), "27 virtual tokens save nothing of a text of 27 tokens"),
        (distill(count=4000), "leave no room"),
        (distill(context=long), "more than the 128 positions"),
        (distill("--prompts", empty), "no prompts"),
        (distill("--prompts", data, "--questions", "-1"), "must be at least 0"),
        (distill("--chat"), "has no chat template"),
        (distill("--chat", "--end", "x"), "--end cannot be given with --chat"),
        (distill("--least-share", "2"), "least_share must be above 0 and at most 1"),
        (distill("--questions", "0"), "no prompt to learn from"),
        (distill("--cache", empty), "not a folder"),
        (distill("--cache", empty / "cache"), f"{empty} is not a folder that you may write to"),
        (distill("--cache", tmp_path / "adapter"), "is in --out"),
        (distill("--cache", tmp_path / "adapter" / "cache"), "is in --out"),
    ]
    for (code, out, err), message in cases:
        assert code == 2, message
        assert message in err
        assert out == ""
        assert "Traceback" not in err
    assert not (tmp_path / "adapter").exists()


def test_ctrl_c_while_answers_are_made(distill, tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("prefixcore.distill.targets.answer", stop)
    code, out, err = distill("--questions", 20)
    assert code == 130
    assert "stopped; nothing was written but what is in" in err
    assert not (tmp_path / "adapter").exists()
    assert {path.name.split("-")[0] for path in (tmp_path / "adapter.distill").iterdir()} == {"questions"}


def test_ctrl_c_while_it_learns_saves_what_there_is(distill, prefixcore, tmp_path, monkeypatch):
    from prefixcore.distill import learning

    real, calls = learning.divergences, []

    def divergences(*arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(learning, "divergences", divergences)
    code, out, err = distill("--questions", 20, "--steps", 9)
    assert (code, out) == (130, "")
    assert re.search(r"stopped after \d steps; saved what there is", err)
    code, out, _ = prefixcore("inspect", tmp_path / "adapter", "--json")
    assert code == 0
    assert json.loads(out)["metrics"] is None


def test_ctrl_c_in_the_last_validation_is_heeded_once_it_is_saved(distill, prefixcore, tmp_path, monkeypatch):
    from prefixcore.distill import learning

    real, calls = learning.divergences, []

    def divergences(*arguments):
        calls.append(1)
        found = real(*arguments)
        if len(calls) == whole:
            signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(learning, "divergences", divergences)
    whole = 0
    assert distill("--questions", 20, "--steps", 3, out=tmp_path / "whole")[0] == 0
    whole = len(calls)
    calls.clear()
    code, out, err = distill("--questions", 20, "--steps", 3)
    assert (code, out) == (130, "")
    assert "measuring" not in err
    for pair, same in zip(
        read_adapter(tmp_path / "adapter").tensors, read_adapter(tmp_path / "whole").tensors, strict=True
    ):
        assert all(map(torch.equal, pair, same))


def test_ctrl_c_while_it_measures_leaves_what_was_trained(distill, prefixcore, tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("prefixcore.distill.run.measure", stop)
        code, out, err = distill("--questions", 20)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == f"prefixcore distill: stopped; the adapter is in {tmp_path / 'adapter'}"
    values = read_adapter(tmp_path / "adapter").tensors
    code, _, err = distill("--questions", 20, out=tmp_path / "whole")
    assert code == 0, err
    for pair, same in zip(values, read_adapter(tmp_path / "whole").tensors, strict=True):
        assert all(map(torch.equal, pair, same))


def test_ctrl_c_while_the_least_is_searched_leaves_the_least_so_far(distill, tmp_path, monkeypatch):
    from prefixcore.distill.student import Student

    real = Student.train

    def train(self, count):
        if count == 1:
            raise KeyboardInterrupt
        return real(self, count)

    monkeypatch.setattr(Student, "train", train)
    monkeypatch.setattr("prefixcore.distill.student.comparable", lambda *_: (1.0, 1.0))
    code, _, err = distill("--questions", 20, "--least-share", "0.5")
    assert code == 130
    assert "stopped; the adapter is in" in err
    assert read_adapter(tmp_path / "adapter").config.num_virtual_tokens == 2


def test_the_defaults_in_its_help_are_those_of_the_options(prefixcore):
    _, out, _ = prefixcore("distill", "--help")
    text = " ".join(out.split())
    default = DistillOptions(num_virtual_tokens=1)
    for words in (
        f"a part (default: {default.part}; with --chat {replace(default, chat=True).part})",
        f"--max-answer-tokens N default: {default.max_answer_tokens}",
        f"a token (default: {default.top_k})",
        f"of its tokens (default: {default.start})",
        f"--steps N default: {default.steps}",
        f"of AdamW (default: {default.learning_rate:g})",
        f"--batch-size N default: {default.batch_size}",
        f"held out (default: {default.eval_fraction:g})",
        f"contains it (default: {default.match})",
        f"parts of the text (default: {default.questions};",
    ):
        assert words in text, words


def test_the_command_has_an_option_for_every_field():
    from prefixcore.cli.distill_options import FIELDS

    assert set(FIELDS.values()) == {field.name for field in fields(DistillOptions)}
