"""One digest covers all of an adapter, and what was said of it is neither lost nor said of other values."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

import prefixcore
from prefixcore.adapters import AdapterError, Manifest, adapter_digest, read_adapter, read_record
from prefixcore.adapters.files import MANIFEST_FILE, MODEL_FILE, PEFT_FILE, STATE_FILE
from prefixcore.adapters.record import CURVE, RECORD

from .models import SHAPES, make_model, save

VERSION_1 = Path(__file__).parent / "version_1"
"""An adapter that prefixcore 0.1.0 wrote."""

SAID = {
    "task": "country -> capital",
    "license": "CC-BY-4.0",
    "intended_use": "Answers one question about geography.",
    "data": {"sha256": "ab" * 32, "name": "capitals.jsonl", "examples": 90},
    "metrics": {"exact_match": 0.9, "loss": 0.25},
    "split": {"name": "held out", "seed": 3, "fraction": 0.1},
    "training": {"steps": 8, "learning_rate": 2e-3, "schedule": "linear", "max_grad_norm": None},
    "seed": 3,
}


def fields_of(folder: Path) -> dict:
    return json.loads((folder / MANIFEST_FILE).read_text())


@pytest.fixture
def model():
    return make_model("llama")


@pytest.fixture
def said(model, tmp_path) -> Path:
    with prefixcore.attach(model, prefixcore.PrefixTuningConfig(4, init="random", reparameterization="mlp")) as handle:
        return handle.save(tmp_path / "said", record={"data": "capitals.jsonl"}, curve=b"\x89PNG", **SAID)


def test_the_digest_is_what_the_manual_says(said):
    """Whoever has Python and nothing else can compute it."""
    fields = fields_of(said)
    stated = fields.pop("digest")
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == stated == adapter_digest(said) == read_adapter(said).digest
    assert fields["files"].keys() == {MODEL_FILE, STATE_FILE, PEFT_FILE, RECORD, CURVE}
    for name, described in fields["files"].items():
        data = (said / name).read_bytes()
        assert described == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_what_is_said_is_read(said):
    manifest = read_adapter(said).manifest
    assert {name: getattr(manifest, name) for name in SAID} == SAID
    assert manifest.digest == adapter_digest(said)
    assert manifest.date.endswith("Z")
    assert manifest.libraries.keys() >= {"prefixcore", "torch", "transformers", "safetensors", "python"}


def test_another_adapter_has_another_digest(model, tmp_path):
    digests = set()
    for task in ("one", "two"):
        with prefixcore.attach(model, prefixcore.PromptTuningConfig(3, init="random")) as handle:
            digests.add(adapter_digest(handle.save(tmp_path / task, task=task)))
    assert len(digests) == 2


def test_a_copy_has_the_same(said, tmp_path):
    copied = shutil.copytree(said, tmp_path / "copy")
    (copied / "README.md").write_text("mine")
    assert adapter_digest(copied) == adapter_digest(said)


@pytest.mark.parametrize("name", [*SAID, "date", "libraries", "base_model", "config", "tokenizer", "files"])
def test_no_field_can_be_changed(said, name):
    """Each field becomes another that says something as well."""
    others = {
        "task": "another", "license": "MIT", "intended_use": "Anything.", "data": {"sha256": "cd" * 32},
        "metrics": {"exact_match": 1.0}, "split": {"name": "test"}, "training": {"steps": 9}, "seed": 4,
        "date": "2020-01-01T00:00:00Z", "libraries": {"torch": "1"}, "tokenizer": {"class": "T"},
    }  # fmt: skip
    fields = fields_of(said)
    if name == "base_model":
        others[name] = {**fields[name], "name_or_path": "another"}
    elif name == "config":
        others[name] = {**fields[name], "seed": 99}
    elif name == "files":
        others[name] = {**fields[name], CURVE: {"bytes": 1, "sha256": "00" * 32}}
    (said / MANIFEST_FILE).write_text(json.dumps({**fields, name: others[name]}))
    for check in (adapter_digest, read_adapter):
        with pytest.raises(AdapterError, match=f"{MANIFEST_FILE}: digest: .* a field was changed"):
            check(said)


def test_pefts_file_is_covered(said):
    peft = json.loads((said / PEFT_FILE).read_text())
    (said / PEFT_FILE).write_text(json.dumps({**peft, "base_model_name_or_path": "another"}))
    with pytest.raises(AdapterError, match=PEFT_FILE):
        read_adapter(said)


def test_the_record_is_covered(said):
    assert read_record(said)["data"] == "capitals.jsonl"
    record = json.loads((said / RECORD).read_text())
    (said / RECORD).write_text(json.dumps({**record, "end": "\n"}))
    with pytest.raises(AdapterError, match=RECORD):
        read_record(said)
    (said / RECORD).unlink()
    assert read_record(said) == {}
    read_adapter(said)


def test_a_record_that_another_has_put_there_is_not_taken(model, tmp_path):
    with prefixcore.attach(model, prefixcore.PromptTuningConfig(3, init="random")) as handle:
        folder = handle.save(tmp_path / "a")
    digest = fields_of(folder)["files"][MODEL_FILE]["sha256"]
    (folder / RECORD).write_text(json.dumps({"adapter_sha256": digest, "end": "evil"}))
    assert read_record(folder) == {}


def test_what_version_1_wrote_is_read(tmp_path, model):
    adapter = read_adapter(VERSION_1)
    assert adapter.manifest.task == "say hello"
    assert adapter.manifest.format_version == 1
    assert (adapter.manifest.date, adapter.manifest.license, adapter.manifest.metrics) == (None, None, None)
    assert adapter.digest == adapter_digest(VERSION_1) == adapter.manifest.digest
    assert Manifest.from_dict(adapter.manifest.to_dict()) == adapter.manifest
    copied = shutil.copytree(VERSION_1, tmp_path / "copy")
    peft = json.loads((copied / PEFT_FILE).read_text())
    (copied / PEFT_FILE).write_text(json.dumps({**peft, "revision": "main"}))
    assert adapter_digest(copied) != adapter.digest
    with prefixcore.load(model, VERSION_1, trainable=True) as handle:
        again = read_adapter(handle.save(tmp_path / "again")).manifest
    assert (again.format_version, again.task, again.derived_from) == (2, "say hello", None)


def test_what_peft_wrote_has_one_too(model, tmp_path):
    save(tmp_path / "peft", "prefix", model, SHAPES["llama"])
    (tmp_path / "peft" / MANIFEST_FILE).unlink()
    digest = adapter_digest(tmp_path / "peft")
    assert digest == read_adapter(tmp_path / "peft").digest
    for name in (MODEL_FILE, PEFT_FILE):
        copied = shutil.copytree(tmp_path / "peft", tmp_path / name)
        data = (copied / name).read_bytes()
        (copied / name).write_bytes(data[:-2] + b" }" if name == PEFT_FILE else data[:-1] + bytes([data[-1] ^ 1]))
        assert adapter_digest(copied) != digest


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"license": ""}, "license: expected a text"),
        ({"intended_use": 3}, "intended_use: expected a text"),
        ({"data": "train.jsonl"}, "data.sha256: expected the SHA-256"),
        ({"data": {"sha256": "AB" * 32}}, "data.sha256: expected the SHA-256"),
        ({"data": {"sha256": "ab" * 32, "examples": []}}, "data.examples: expected a text, a finite number"),
        ({"metrics": {"loss": 1.0}}, "split: missing; metrics say nothing without it"),
        ({"metrics": {"loss": float("nan")}, "split": {"name": "test"}}, "metrics.loss: expected a finite number"),
        ({"metrics": {}, "split": {"name": "test"}}, "metrics: expected numbers by their names"),
        ({"metrics": {"loss": True}, "split": {"name": "test"}}, "metrics.loss: expected a finite number"),
        ({"split": {}}, "split: expected an object"),
        ({"training": {"betas": [1]}}, "training.betas: expected a text, a finite number"),
        ({"seed": -1}, "seed: expected an integer from 0"),
        ({"seed": True}, "seed: expected an integer from 0"),
    ],
    ids=str,
)
def test_what_cannot_be_said_is_refused_before_a_write(given, message, model, tmp_path):
    handle = prefixcore.attach(model, prefixcore.PromptTuningConfig(3, init="random"))
    with pytest.raises(AdapterError, match=message):
        handle.save(tmp_path / "a", **given)
    assert not (tmp_path / "a").exists()


def test_a_reloaded_adapter_keeps_what_holds(model, said, tmp_path):
    for trainable in (False, True):
        with prefixcore.load(model, said, trainable=trainable) as handle:
            again = read_adapter(handle.save(tmp_path / f"again-{trainable}")).manifest
        assert {name: getattr(again, name) for name in SAID} == SAID
        assert again.derived_from is None


def test_other_values_have_no_metrics_and_name_where_they_come_from(model, said, tmp_path):
    digest, folder = adapter_digest(said), said
    for generation in (1, 2):
        with prefixcore.load(model, folder, trainable=True) as handle:
            with torch.no_grad():
                next(handle.parameters()).add_(0.1)
            folder = handle.save(tmp_path / str(generation), license="MIT" if generation == 2 else None)
        manifest = read_adapter(folder).manifest
        assert (manifest.task, manifest.intended_use) == (SAID["task"], SAID["intended_use"])
        assert (manifest.data, manifest.metrics, manifest.split, manifest.training, manifest.seed) == (None,) * 5
        assert len(manifest.derived_from) == generation
    assert manifest.license == "MIT"
    assert manifest.derived_from[0] == {
        "digest": digest, "date": fields_of(said)["date"], "data": SAID["data"]["sha256"]
    }  # fmt: skip
    assert manifest.derived_from[1]["digest"] == adapter_digest(tmp_path / "1")


def test_metrics_of_another_model_are_not_kept(said, tmp_path):
    with (
        pytest.warns(UserWarning, match="loaded all the same"),
        prefixcore.load(make_model("llama", seed=1), said, strict=False) as handle,
    ):
        manifest = read_adapter(handle.save(tmp_path / "forced")).manifest
    assert manifest.metrics is None
    assert manifest.derived_from[0]["digest"] == adapter_digest(said)


def test_a_new_record_of_the_same_values_stays_with_them(model, said):
    with prefixcore.load(model, said, trainable=True) as handle:
        handle.save(said)
    assert read_record(said)["data"] == "capitals.jsonl"
    assert (said / CURVE).read_bytes() == b"\x89PNG"
    assert RECORD in fields_of(said)["files"]
