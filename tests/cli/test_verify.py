"""`prefixcore verify`: a line for each check, the names of those that fail, and an exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from prefixcore.__main__ import main
from prefixcore.adapters.files import MANIFEST_FILE, MODEL_FILE
from tests import tiny
from tests.redigest import redigest


@pytest.fixture(scope="module")
def complete(tmp_path_factory, model_folder, data) -> Path:
    """An adapter of which everything is said; nobody changes it."""
    out = tmp_path_factory.mktemp("verify") / "swap"
    said = ["--task", "two letters swapped", "--license", "MIT", "--intended-use", "A test."]
    arguments = ["train", "--model", model_folder, "--data", data, "--out", out, "--end", "\\n", *said]
    assert main([str(a) for a in [*arguments, "--method", "prefix", "--init-text", "ab -> ba\n", "--steps", 30]]) == 0
    return out


@pytest.fixture
def changed(complete, tmp_path):
    """`changed(**fields)` -> a copy with other fields in its manifest, whose digest is right."""

    def call(**fields) -> Path:
        folder = shutil.copytree(complete, tmp_path / "changed", dirs_exist_ok=True)
        manifest = {**json.loads((complete / MANIFEST_FILE).read_text()), **fields}
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
        redigest(folder, files=False)
        text = json.dumps(json.loads((folder / MANIFEST_FILE).read_text()), indent=2, sort_keys=True)
        (folder / MANIFEST_FILE).write_text(text)
        return folder

    return call


def test_all_is_well(prefixcore, complete, model_folder, data):
    code, out, err = prefixcore("verify", complete)
    assert (code, err) == (0, "")
    assert all(line.startswith(("ok ", "not checked ")) for line in out.splitlines())
    code, out, err = prefixcore("verify", complete, "--model", model_folder, "--data", data, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["failed"] == []
    checks = {check["name"]: check for check in facts["checks"]}
    assert checks["model"]["outcome"] == checks["measured"]["outcome"] == "ok"
    assert "on 2 held-out examples; the training data is the manifest's" in checks["measured"]["detail"]
    assert checks["signature"]["outcome"] == "not checked"


def test_what_fails_is_named(prefixcore, changed):
    folder = changed(license=None, seed=None)
    data = bytearray((folder / MODEL_FILE).read_bytes())
    data[-1] ^= 1
    (folder / MODEL_FILE).write_bytes(data)
    code, out, err = prefixcore("verify", folder)
    assert code == 1
    assert err == f"prefixcore verify: {folder}: failed: files, loads, license, seed\n"
    assert [line.split()[1] for line in out.splitlines() if line.startswith("FAILED")] == [
        "files",
        "loads",
        "license",
        "seed",
    ]
    code, out, _ = prefixcore("verify", folder, "--json")
    assert code == 1
    assert json.loads(out)["failed"] == ["files", "loads", "license", "seed"]
    code, out, err = prefixcore("verify", changed(license=None), "--skip", "license")
    assert (code, err) == (0, "")
    assert "skipped" in out


def test_another_model(prefixcore, complete, tmp_path):
    tiny.model(seed=1).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    code, out, err = prefixcore("verify", complete, "--model", tmp_path / "other")
    assert code == 1
    assert err.endswith("failed: model\n")
    assert "other weights" in out


def test_a_score_that_is_not_there(prefixcore, complete, changed, model_folder, data):
    manifest = json.loads((complete / MANIFEST_FILE).read_text())
    folder = changed(metrics={**manifest["metrics"], "loss": 0.1})
    code, out, err = prefixcore("verify", folder, "--model", model_folder, "--data", data)
    assert code == 1
    assert err.endswith("failed: measured\n")
    assert "loss: 0.1 in the manifest, " in out


def test_other_data(prefixcore, complete, model_folder, data, tmp_path):
    lines = data.read_text().splitlines()
    for name, text, message in (
        ("fewer.jsonl", "\n".join(lines[:-1]), "holds no examples with the digest of the manifest's split"),
        ("other.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "b"}', "holds no examples"),
    ):
        (tmp_path / name).write_text(text)
        code, out, err = prefixcore("verify", complete, "--model", model_folder, "--data", tmp_path / name)
        assert code == 1
        assert err.endswith("failed: measured\n")
        assert message in out
    held_out = json.loads((complete / MANIFEST_FILE).read_text())["split"]["sha256"]
    assert held_out in out


def test_the_held_out_examples_alone_are_enough(prefixcore, complete, model_folder, data, tmp_path):
    from prefixcore.training import read_jsonl, split

    _, held_out = split(read_jsonl(data), 0.1, 0)
    lines = [json.dumps({"prompt": e.prompt, "completion": e.completion, "more": 1}) for e in held_out]
    (tmp_path / "held-out.jsonl").write_text("\n".join(lines))
    code, out, err = prefixcore("verify", complete, "--model", model_folder, "--data", tmp_path / "held-out.jsonl")
    assert code == 0, err
    assert "on 2 held-out examples" in out
    assert "training data" not in out


def test_a_damaged_one_is_not_measured(prefixcore, changed, model_folder, data):
    folder = changed()
    (folder / MODEL_FILE).write_bytes(b"")
    code, out, err = prefixcore("verify", folder, "--model", model_folder, "--data", data)
    assert code == 1
    assert "not checked  measured" in out
    assert "measured" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "x.jsonl"], "--data is measured with the base model: give --model"),
        (["--signature", "x.sig"], "--signature is checked with a key: give --public-key"),
        (["--skip", "everything"], "--skip everything: no check of this name; there are manifest, digest"),
    ],
)
def test_options_that_ask_for_nothing(prefixcore, complete, options, message):
    code, out, err = prefixcore("verify", complete, *options)
    assert (code, out) == (2, "")
    assert message in err


def test_no_adapter(prefixcore, tmp_path):
    assert prefixcore("verify", tmp_path / "nothing")[0] == 2
    code, _, err = prefixcore("verify", tmp_path)
    assert code == 1
    assert err.endswith("failed: manifest, loads\n")


def test_where_statements_alone_are_missing_it_says_so(prefixcore, changed):
    folder = changed(license=None, intended_use=None)
    code, _, err = prefixcore("verify", folder)
    assert code == 1
    first, second = err.splitlines()
    assert first.endswith("failed: license, intended_use")
    assert "these statements are missing" in second
    assert second.endswith("--skip license --skip intended_use")
    code, _, err = prefixcore("verify", folder, "--skip", "license", "--skip", "intended_use")
    assert (code, err) == (0, "")
