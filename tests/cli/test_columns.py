"""`--prompt-column` and `--completion-column`: data whose columns have other names, in every command that reads it."""

from __future__ import annotations

import json

import pytest

NAMES = ("--prompt-column", "question", "--completion-column", "answer")


@pytest.fixture
def renamed(data, tmp_path):
    """The examples of `data`, as a list of objects with other names."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    path = tmp_path / "qa.json"
    path.write_text(json.dumps([{"question": row["prompt"], "answer": row["completion"]} for row in rows], indent=1))
    return path


def train_on(prefixcore, model_folder, data, out, *options):
    base = ["train", "--model", model_folder, "--data", data, "--method", "prefix", "--num-virtual-tokens", 2]
    return prefixcore(*base, "--init", "vocab", "--steps", 2, "--out", out, *options)


def test_the_same_is_learnt_verified_asked_and_audited(prefixcore, model_folder, data, renamed, tmp_path):
    code, out, err = train_on(prefixcore, model_folder, renamed, tmp_path / "qa", *NAMES)
    assert code == 0, err
    assert train_on(prefixcore, model_folder, data, tmp_path / "usual")[1] == out
    manifests = [json.loads((tmp_path / each / "prefixcore_manifest.json").read_text()) for each in ("qa", "usual")]
    assert manifests[0]["data"]["sha256"] == manifests[1]["data"]["sha256"]
    named = {"prompt_column": "question", "completion_column": "answer"}
    assert manifests[0]["training"] == {**manifests[1]["training"], **named}

    checked = ["verify", tmp_path / "qa", "--model", model_folder, "--skip", "license", "--skip", "intended_use"]
    code, out, err = prefixcore(*checked, "--data", renamed)
    assert code == 0, err
    assert "the training data is the manifest's" in out

    asked = ["--model", model_folder, "--adapter", tmp_path / "qa", "--max-new-tokens", 2, "--prompts"]
    assert prefixcore("generate", *asked, renamed, *NAMES) == prefixcore("generate", *asked, data)

    options = ["--model", model_folder, "--limit", 4, "--trials", 0, "--json", "--out", tmp_path / "page.html"]
    found = [json.loads(prefixcore("audit", tmp_path / "qa", "--probe", path, *more, *options)[1])
             for path, more in ((renamed, NAMES), (data, ()))]  # fmt: skip
    assert found[0]["task"]["rows"] == found[1]["task"]["rows"]


def test_tune_prints_them(prefixcore, model_folder, renamed, tmp_path):
    options = ["--method", "prefix", "--minutes", 0.02, "--lengths", "2", "--lrs", "0.001", "--most-steps", 1]
    given = ["--model", model_folder, "--data", renamed, "--out", tmp_path / "tuned"]
    code, out, err = prefixcore("tune", *given, *options, *NAMES)
    assert code == 0, err
    assert " ".join(NAMES) in out


def test_distill_reads_them(prefixcore, model_folder, renamed, tmp_path):
    (tmp_path / "text").write_text("ab -> ba\ncd -> dc\nef -> fe\n")
    given = ["--model", model_folder, "--context", tmp_path / "text", "--prompts", renamed, "--num-virtual-tokens", 2]
    options = ["--steps", 1, "--max-answer-tokens", 2, "--out", tmp_path / "out"]
    code, _, err = prefixcore("distill", *given, *options)
    assert code == 2
    assert "item 1: the field 'prompt' must be a text that is not empty (found: question, answer)" in err
    code, out, err = prefixcore("distill", *given, *options, *NAMES)
    assert code == 0, err
    assert "right" in out


def test_names_are_not_for_conversations(prefixcore, model_folder, renamed, tmp_path):
    code, _, err = train_on(prefixcore, model_folder, renamed, tmp_path / "out", *NAMES, "--chat")
    assert code == 2
    assert "leave them out with --chat" in err
    code, _, err = train_on(prefixcore, model_folder, renamed, tmp_path / "out")
    assert code == 2
    assert "item 1: the field 'prompt' is missing (found: question, answer); what they are called can be said" in err
