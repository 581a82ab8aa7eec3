"""`prefixcore audit`: what it writes, what it prints, and what it refuses."""

from __future__ import annotations

import json

import pytest

from tests.cli.test_train_chat import model_with, write
from tests.training import templates


@pytest.fixture
def audit(prefixcore, model_folder, data, adapter, tmp_path, monkeypatch):
    """`audit(*options)` -> (exit code, standard output, standard error), in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*options, folder=adapter, probe=data):
        base = ["audit", folder, "--model", model_folder, "--probe", probe, "--limit", 6, "--trials", 2]
        return prefixcore(*base, *options)

    return call


def test_writes_a_page_and_its_json_and_prints_the_summary(audit, tmp_path):
    code, out, err = audit()
    assert code == 0, err
    report = json.loads((tmp_path / "swap-audit.json").read_text())
    assert out.splitlines() == report["summary"]
    assert report["settings"]["end"] == "\n"  # as it was trained
    assert report["task"]["used"] == 6
    assert "page     swap-audit.html" in err
    page = (tmp_path / "swap-audit.html").read_text()
    assert report["summary"][0] in page
    assert report["task"]["name"] == "swap"


def test_an_adapter_of_conversations_is_asked_as_the_probes_are_written(prefixcore, audit, data, tmp_path):
    model = model_with(templates.HERMES, tmp_path / "hermes")
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    base = ["--model", model, "--data", write(tmp_path / "chat.jsonl", rows), "--chat", "--eval-fraction", 0]
    options = ["--method", "prefix", "--num-virtual-tokens", 2, "--init", "vocab", "--steps", 1]
    assert prefixcore("train", *base, *options, "--out", tmp_path / "chat")[0] == 0
    code, _, err = audit("--model", model, folder=tmp_path / "chat")
    assert code == 0, err
    assert "chat was trained on conversations, and an audit asks with prompts as they are" in err
    assert "conversations" not in audit()[2]


def test_probes_of_a_table(audit, tmp_path):
    (tmp_path / "probes.csv").write_text("prompt,completion\nab ->, ba\nce ->, ec\n")
    code, _, err = audit(probe=tmp_path / "probes.csv")
    assert code == 0, err
    assert json.loads((tmp_path / "swap-audit.json").read_text())["task"]["used"] == 2


def test_a_folder_other_tasks_and_examples(audit, data, tmp_path):
    other = tmp_path / "upper.jsonl"
    other.write_text('{"prompt": "a =", "completion": " A"}\n')
    options = [
        "--other",
        other,
        "--generic",
        "--examples",
        data,
        "--instruction",
        r"Swap.\n",
        "--out",
        "pages",
        "--json",
    ]
    code, out, err = audit(*options)
    assert code == 0, err
    report = json.loads(out)
    assert sorted(path.name for path in (tmp_path / "pages").iterdir()) == ["audit.html", "audit.json"]
    assert [found["name"] for found in report["others"]] == ["upper", "built-in texts"]
    assert "Swap.\n" in [each["text"] for each in report["text"]["candidates"]]


def test_bad_requests_are_one_line_and_write_nothing(audit, adapter, data, tmp_path, prefixcore, model_folder):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n')
    same = tmp_path / "more" / data.name
    same.parent.mkdir()
    same.write_text(data.read_text())
    (tmp_path / "taken" / "audit.html").mkdir(parents=True)
    for options, message in (
        ({"probe": tmp_path / "none.jsonl"}, "none.jsonl: no such file"),
        ({"probe": broken}, "the field 'completion' is missing"),
        ({"folder": tmp_path / "nowhere"}, "is not a folder"),
        ({"folder": model_folder}, "not an adapter"),
        (("--out", adapter / "page.html"), "holds the adapter alone"),
        (("--out", "taken"), "is a folder"),
        (("--trials", -1), "--trials must be at least 0"),
        (("--other", data, "--other", same), "another file has the name"),
        (("--limit", 0), "must be at least 1"),
    ):
        code, out, err = audit(**options) if isinstance(options, dict) else audit(*options)
        assert code == 2, message
        assert message in err
        assert len(err.strip().splitlines()) == 1
        assert not out
    assert not list(tmp_path.glob("*.html"))


def test_another_model_is_refused_and_force_is_recorded(audit, tmp_path):
    import torch

    from tests import tiny

    model = tiny.model(seed=1)
    with torch.no_grad():
        model.lm_head.weight.add_(0.5)
    model.save_pretrained(tmp_path / "other-model")
    tiny.tokenizer().save_pretrained(tmp_path / "other-model")
    code, _, err = audit("--model", tmp_path / "other-model")
    assert code == 2
    assert "model" in err
    code, _, err = audit("--model", tmp_path / "other-model", "--force")
    assert code == 0, err
    assert "warning: " in err
    assert "is loaded all the same" in err
    report = json.loads((tmp_path / "swap-audit.json").read_text())
    assert report["subject"]["forced"]
    assert report["limits"][0].startswith("The model is not the one")


def test_the_task_s_own_probes_are_no_other_task(audit, data, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_bytes(data.read_bytes())
    code, out, err = audit("--other", other)
    assert (code, out) == (2, "")
    assert "other: all its prompts are probes of the adapter's own task" in err
    assert not (tmp_path / "swap-audit.html").exists()


HOSTILE = """<script>alert(1)</script><img src=x onerror="a()">\"'&amp;</title>{{ 7*7 }}%s$x_\x1b[2J\x07\u202e\r"""


@pytest.mark.parametrize("text", [HOSTILE, "x" * 10240], ids=["markup and control characters", "10 kB"])
def test_whatever_an_adapter_says_of_itself_is_shown_as_text(audit, tmp_path, text):
    from html.parser import HTMLParser

    from prefixcore import PromptTuningConfig, attach
    from tests import tiny

    name = text[:80].replace("/", "_")
    with attach(tiny.model(), PromptTuningConfig(num_virtual_tokens=2, init="random")) as handle:
        folder = handle.save(tmp_path / name, task=text, license=text, intended_use=text, training={"note": text})
    files = [tmp_path / f"{kind} {name}.jsonl" for kind in ("probe", "other")]
    for file, sign in zip(files, ("->", "="), strict=True):
        lines = [{"prompt": f"{text[:50]}{each} {sign}", "completion": each} for each in ("ab", "cd", "ef", "gh")]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--other", files[1], "--examples", files[1], "--instruction", text[:60], "--out", "pages"]
    code, out, err = audit(*options, folder=folder, probe=files[0])
    assert code == 0, err
    assert all(c.isprintable() or c == "\n" for c in out + err)
    assert max(map(len, (out + err).splitlines())) < 2500
    page = (tmp_path / "pages" / "audit.html").read_text()
    assert all(c.isprintable() or c in "\n\xa0" for c in page)
    assert "x" * 2000 not in page
    tags, attributes = set(), []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, found):
            tags.add(tag)
            attributes.extend(found)

    Parser().feed(page)
    assert not tags & {"script", "iframe", "object", "embed", "link"}
    assert not [name for name, _ in attributes if name.startswith("on")]
    assert all(value.startswith("data:image/") for name, value in attributes if name == "src")
    assert json.loads((tmp_path / "pages" / "audit.json").read_text())["subject"]["task"] == text
