"""`prefixcore train` and `tune` on conversations with tools, and on those that a template writes turn by turn."""

from __future__ import annotations

import json

import pytest

from prefixcore.adapters import read_adapter
from prefixcore.training import describe_data, read_examples, split
from tests import tiny
from tests.training import templates

METHOD = ("--method", "prefix", "--num-virtual-tokens", 3)
SAID = ("--license", "MIT", "--intended-use", "A test.", "--max-length", 1000)


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def model_with(template, folder):
    """A model, and the template that it writes conversations with."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tiny.folder(folder))
    return folder


def test_conversations_with_tools_are_trained_on_and_verified(prefixcore, tmp_path):
    """Read, split, started from, learnt, saved and measured again; the ids are those of the data."""
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, templates.call(f"{n}")], "tools": [templates.WEATHER]}
        for n in range(9)
    ]
    data = write(tmp_path / "tools.jsonl", rows)
    base = ["--model", model_with(templates.HERMES, tmp_path / "hermes"), "--data", data, "--chat"]
    base += [*METHOD, "--eval-fraction", 0.3, *SAID]
    code, out, err = prefixcore("train", *base, "--steps", 2, "--out", tmp_path / "adapter")
    assert code == 0, err
    manifest = read_adapter(tmp_path / "adapter").manifest
    assert manifest.data["sha256"] == describe_data(split(read_examples(data, chat=True), 0.3, 0)[0])["sha256"]
    code, out, err = prefixcore("verify", tmp_path / "adapter", "--model", base[1], "--data", data)
    assert code == 0, out + err
    assert "on 3 held-out examples; the training data is the manifest's" in out


def test_conversations_of_which_each_turn_is_an_example(prefixcore, tmp_path):
    """Of a template that writes earlier turns otherwise; steps count the examples, and the manifest holds them."""
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    rows = [{"messages": [{"role": "user", "content": f"{n}"}, *turns[1:]]} for n in range(5)]
    data = write(tmp_path / "turns.jsonl", rows)
    base = ["--model", model_with(templates.THINKING, tmp_path / "thinking"), "--data", data, "--chat"]
    base += [*METHOD, "--eval-fraction", 0.2, *SAID, "--epochs", 1, "--batch-size", 1]
    code, out, err = prefixcore("train", *base, "--out", tmp_path / "adapter")
    assert code == 0, err
    assert "4 conversations became 8 examples, each of one turn to learn" in err
    assert "8 examples to train on, 2 held out" in err
    manifest = read_adapter(tmp_path / "adapter").manifest
    assert (manifest.training["steps"], manifest.data["examples"], manifest.split["examples"]) == (8, 8, 2)
    code, out, err = prefixcore("verify", tmp_path / "adapter", "--model", base[1], "--data", data)
    assert code == 0, out + err
    assert "on 2 held-out examples; the training data is the manifest's" in out


@pytest.mark.parametrize("command", ["train", "tune"])
def test_what_a_template_leaves_out_is_one_clear_line(prefixcore, tmp_path, command):
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, templates.call(f"{n}")], "tools": [templates.WEATHER]}
        for n in range(3)
    ]
    model = model_with(templates.IGNORES, tmp_path / "plain")
    base = ["--model", model, "--data", write(tmp_path / "tools.jsonl", rows), "--chat", *METHOD]
    code, _, err = prefixcore(command, *base, "--out", tmp_path / "adapter")
    assert code == 2
    assert "tools.jsonl, line " in err
    assert "the model's chat template does not write the tools; leave them out" in err
    assert not (tmp_path / "adapter").exists()
    code, _, err = prefixcore(command, *base, "--end", "x", "--out", tmp_path / "adapter")
    assert code == 2
    assert "--end cannot be given with --chat" in err
