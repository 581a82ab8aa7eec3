"""The demo of distillation: its texts, and a run of it on a tiny model."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefixcore
from bench.demo_distill import __main__ as demo
from bench.demo_distill import compose, texts
from bench.demo_distill.texts import TEXTS, Text, make
from prefixcore.distill import read_prompts
from tests import tiny


def given(options, name):
    return options[options.index(name) + 1]


@pytest.fixture
def _no_network(monkeypatch):
    """Sentences and headlines in place of those that are downloaded."""
    pairs = [(f"Thing {i} works.", "positive" if i % 3 else "negative") for i in range(400)]
    monkeypatch.setattr(texts.sources, "reviews", lambda name: list(pairs))
    monkeypatch.setattr(texts.sources, "headlines", lambda: [(f"Headline {i}", "sport") for i in range(400)])


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize("name", demo.NAMES)
def test_what_is_held_out_is_not_learnt_and_not_in_the_text(name, tmp_path):
    text = make(name, tmp_path)
    held_out = read_prompts(given(text.options, "--eval-prompts"))
    assert len(held_out) >= 25
    assert all(prompt.completion for prompt in held_out)
    lines = text.context.read_text().splitlines()
    assert not any(line.startswith(prompt.text.splitlines()[0]) for line in lines for prompt in held_out)
    if "--prompts" in text.options:
        learnt = read_prompts(given(text.options, "--prompts"))
        assert not {prompt.text for prompt in learnt} & {prompt.text for prompt in held_out}


def test_the_handbook_says_what_is_asked():
    text = (TEXTS / "harbour.txt").read_text().casefold()
    assert all(prompt.completion.strip().casefold() in text for prompt in read_prompts(TEXTS / "harbour.jsonl"))


def test_a_run_writes_the_adapter_and_what_was_printed(tmp_path, monkeypatch, capsys):
    context = tmp_path / "context.txt"
    context.write_text("ab -> ba\ncd -> dc\nxy -> yx\nkl -> lk\n")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{a}{b} ->"}) + "\n" for a in "mno" for b in "pqrs"))
    options = ["--prompts", str(prompts), "--steps", "2", "--max-answer-tokens", "3"]
    monkeypatch.setattr(demo, "make", lambda name, folder: Text(name, "a few pairs", context, options))
    model = tiny.folder(tmp_path / "model")
    monkeypatch.setattr(demo.base_model, "converted_model", lambda: model)
    assert demo.main(["--texts", "capitals", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "--num-virtual-tokens 3" in printed
    summary = (tmp_path / "out" / "capitals.summary.txt").read_text()
    assert "distilled prefix   3" in summary
    assert (tmp_path / "out" / "capitals" / "curve.png").is_file()


def test_prefixes_are_measured_alone_and_one_behind_the_other(tmp_path, monkeypatch, capsys):
    """A prefix made of a whole text answers its own prompts as the text does; behind or of another it need not."""
    folder = tiny.folder(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    contexts = {"capitals": "ab -> ba\ncd -> dc\n", "harbour": "the ferry leaves at nine\n"}
    found = {}
    for name, context in contexts.items():
        file, prompts = tmp_path / f"{name}.txt", tmp_path / f"{name}.jsonl"
        file.write_text(context)
        prompts.write_text("".join(json.dumps({"prompt": f"{a} ->", "completion": " x"}) + "\n" for a in "mnop"))
        found[name] = Text(name, "a text", file, ["--eval-prompts", str(prompts), "--max-answer-tokens", "3"])
        with prefixcore.attach(model, prefixcore.PrefixTuningConfig(init_text=context), tokenizer=tokenizer) as handle:
            handle.save(tmp_path / name)
    monkeypatch.setattr(compose, "make", lambda name, folder: found[name])
    monkeypatch.setattr(compose.base_model, "load", lambda: (model, tokenizer))
    monkeypatch.setattr("sys.argv", ["compose", "--out", str(tmp_path)])
    assert compose.main() == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    lengths = {name: len(tokenizer(context)["input_ids"]) for name, context in contexts.items()}
    assert [row[:2] for row in rows[-1:]] == [[f"harbour, then capitals ({sum(lengths.values())})", "harbour"]]
    same = {(row[0].partition(" (")[0], row[1]): row[3:] == ["1.00", "1.00", "0.00"] for row in rows}
    assert all(same[name, name] for name in contexts)
    assert not all(same.values())
    (tmp_path / "harbour" / "prefixcore_manifest.json").unlink()
    assert compose.main() == 1
    assert "no adapter 'harbour'" in capsys.readouterr().out
