"""`make audit-demo`: what it trains, what it asks with, and what it keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.demo import audit, base_model, task
from prefixcore.__main__ import parser
from prefixcore.training import read_jsonl


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands that are run, each read by the real parser, none carried out."""
    found = []

    def run(arguments):
        found.append(parser().parse_args(arguments))
        if arguments[0] == "audit":
            page = Path(found[-1].out)
            page.write_text("page")
            page.with_suffix(".json").write_text("json")
        return 0

    monkeypatch.setattr(audit, "prefixcore", run)
    monkeypatch.setattr(audit, "FOLDER", tmp_path)
    monkeypatch.setattr(audit, "OUT", tmp_path / "out" / "audit")
    monkeypatch.setattr(base_model, "converted_model", lambda: tmp_path / "model")
    return found


def test_adapters_are_trained_once_and_audited_on_other_countries(commands, tmp_path):
    (tmp_path / "out" / "audit" / "capitals-soft-prompt").mkdir(parents=True)
    assert audit.main([]) == 0
    assert [command.command for command in commands] == ["train", "audit", "audit"]
    train, first, second = commands
    assert train.task == "country -> capital"
    assert (first.adapter.name, second.adapter.name) == ("capitals-prefix", "capitals-soft-prompt")
    asked, shown = ({e.prompt for e in read_jsonl(path)} for path in (first.probe, first.examples))
    assert len(asked) == task.HELD_OUT
    assert not asked & shown
    assert read_jsonl(first.other[0])[0].completion.endswith("\n")
    assert not (tmp_path / "audit.html").exists()


def test_the_page_is_kept_where_it_is_asked_for(commands, tmp_path):
    assert audit.main(["--keep"]) == 0
    assert (tmp_path / "audit.html").read_text() == "page"
    assert (tmp_path / "audit.json").read_text() == "json"
