"""`prefixcore generate --prompts`: a file of prompts or conversations, and how many answers are right."""

from __future__ import annotations

import json
import shutil

import pytest

from prefixcore.adapters.files import MANIFEST_FILE
from prefixcore.training import read_examples
from tests.cli.test_train_chat import model_with, write
from tests.redigest import redigest
from tests.training import templates


@pytest.fixture
def generate(prefixcore, model_folder, adapter):
    def call(*options):
        given = ("--model", model_folder, "--adapter", adapter, "--max-new-tokens", 4)
        return prefixcore("generate", *given, *map(str, options))

    return call


def test_a_file_of_prompts(generate, tmp_path):
    code, expected, cut = generate("--prompt", "av ->", "--prompt", "bw ->", "--json")
    assert cut == "2 of 2 answers were cut at 4 tokens (--max-new-tokens)\n"
    answers = [json.loads(line)["completion"] for line in expected.splitlines()]
    (tmp_path / "plain").write_text("av ->\nbw ->\n")
    assert generate("--prompts", tmp_path / "plain", "--json") == (code, expected, cut)
    rows = [{"prompt": "av ->", "completion": answers[0]}, {"prompt": "bw ->", "completion": "another"}]
    code, out, err = generate("--prompts", write(tmp_path / "known.jsonl", rows), "--json")
    assert (code, err) == (0, f"{cut}right  1 of 2 (50.0%)\n")
    first, second = map(json.loads, out.splitlines())
    assert first == {**rows[0], "expected": answers[0].split("\n")[0], "right": True}
    assert (second["completion"], second["expected"], second["right"]) == (answers[1], "another", False)


def test_an_adapter_that_has_lost_its_record_is_asked_as_its_manifest_says(generate, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "copy")
    asked = ["--prompt", "av ->", "--adapter", folder, "--max-new-tokens", 20, "--json"]
    whole = json.loads(generate(*asked, "--end", "")[1])["completion"]
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["training"]["end"] = whole[3]
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    redigest(folder, files=False)
    (folder / "training.json").unlink()
    code, out, err = generate(*asked)
    assert json.loads(out)["completion"] == whole[: whole.index(whole[3])]
    assert (code, err) == (0, "")  # it ended, and was not cut


def test_the_examples_of_a_training(generate, data):
    """A file that `train` reads is one that `generate` answers, in its order."""
    code, out, err = generate("--prompts", data)
    assert code == 0
    assert len(out.splitlines()) == len(read_examples(data)) == 25
    assert " of 25 (" in err


def test_conversations_with_tools(prefixcore, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, templates.call(f"{n}")], "tools": [templates.WEATHER]}
        for n in range(3)
    ]
    data, model = write(tmp_path / "tools.jsonl", rows), model_with(templates.HERMES, tmp_path / "hermes")
    base = ["--model", model, "--data", data, "--chat", "--max-length", 1000, "--eval-fraction", 0]
    code, _, err = prefixcore(
        "train", *base, "--method", "prefix", "--num-virtual-tokens", 2, "--steps", 1, "--out", tmp_path / "adapter"
    )
    assert code == 0, err
    given = ["--adapter", tmp_path / "adapter", "--prompts", data, "--max-new-tokens", 2]
    code, out, err = prefixcore("generate", *given, "--json")
    assert code == 0, err
    first = json.loads(out.splitlines()[0])
    assert first["messages"] == rows[0]["messages"][:1]
    assert '<tool_call>\n{"name": "weather"' in first["expected"]
    assert err.splitlines()[-1] == "right  0 of 3 (0.0%)"


def test_what_cannot_be_asked(generate, tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}])
    for options, expected in (
        (("--prompts", tmp_path / "nowhere"), "nowhere: no such file"),
        (("--prompts", rows), "the model's tokenizer has no chat template"),
        (("--prompts", rows, "--prompt", "a"), "--prompt and --prompts were both given"),
        (("--prompts", write(tmp_path / "long.jsonl", [{"prompt": "a" * 99_999}])), "long.jsonl, line 1: 99,999 char"),
    ):
        code, out, err = generate(*options)
        assert (code, out) == (2, "")
        assert expected in err
