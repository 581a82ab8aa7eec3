"""No character from a file or a model steers the terminal."""

from __future__ import annotations

import json
import sys

from prefixcore.training import predict
from prefixcore.training.ending import Answer
from tests.redigest import redigest

from .commands import changed


def test_nothing_from_a_file_steers_the_terminal(prefixcore, adapter, tmp_path):
    evil = "\x1b[2J\x9b31m\u202e\x07\ud800"
    folder = changed(
        adapter, tmp_path / "adapter", "training.json",
        data=evil, held_out={evil: {"loss": 1.0, "exact_match": 0.5, "examples": 2}},
    )  # fmt: skip
    manifest = json.loads((adapter / "prefixcore_manifest.json").read_text())
    manifest["task"] = evil + "\nmethod  forged"
    manifest["libraries"][evil] = evil
    manifest["base_model"]["name_or_path"] = evil
    (folder / "prefixcore_manifest.json").write_text(json.dumps(manifest))
    redigest(folder)
    code, table, err = prefixcore("inspect", folder)
    assert (code, err) == (0, "")
    assert table.replace("\n", "").isprintable()
    assert table.count("\\x1b[2J\\x9b31m\\u202e\\x07\\ud800") == 6
    assert not any(line.startswith("method  forged") for line in table.splitlines())
    code, text, _ = prefixcore("inspect", folder, "--json")
    assert code == 0
    assert text.replace("\n", "").isprintable()
    facts = json.loads(text)
    assert facts["task"] == manifest["task"]
    assert facts["training"]["data"] == evil


def test_answers_are_raw_in_a_file_and_escaped_on_a_terminal(prefixcore, model_folder, adapter, monkeypatch):
    said = [Answer("\x1b[2Jgone\x9b", is_whole=True)]
    module = sys.modules[predict.__module__]
    monkeypatch.setattr(module, "answers_to", lambda *args, **kwargs: said)
    base = ["generate", "--model", model_folder, "--adapter", adapter, "--prompt", "a"]
    assert prefixcore(*base)[1] == "\x1b[2Jgone\x9b\n"
    line = prefixcore(*base, "--json")[1].rstrip("\n")
    assert line.isprintable()
    assert json.loads(line)["completion"] == "\x1b[2Jgone\x9b"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert prefixcore(*base)[1] == "\\x1b[2Jgone\\x9b\n"
