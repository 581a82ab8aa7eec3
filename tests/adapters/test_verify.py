"""Whatever is done to an adapter, a check of a fitting name fails, and the others pass."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import prefixcore
from prefixcore.adapters import AdapterError, read_adapter, verify_adapter
from prefixcore.adapters.files import MANIFEST_FILE, MODEL_FILE, PEFT_FILE, STATE_FILE
from prefixcore.adapters.record import CURVE, RECORD
from prefixcore.adapters.verify import SAID, failures
from tests.redigest import redigest

from .models import SHAPES, make_model, save
from .test_digest import SAID as SAID_OF_IT

VERSION_1 = Path(__file__).parent / "version_1"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """An adapter with every file that there is, of which everything is said."""
    said = {**SAID_OF_IT, "split": {**SAID_OF_IT["split"], "sha256": "ef" * 32}}
    config = prefixcore.PrefixTuningConfig(4, init="random", reparameterization="mlp", encoder_hidden_size=6)
    with prefixcore.attach(make_model("llama"), config) as handle:
        folder = tmp_path_factory.mktemp("verify") / "capitals"
        return handle.save(folder, record={"data": "capitals.jsonl"}, curve=b"\x89PNG", **said)


@pytest.fixture
def adapter(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "capitals")


def failed(folder: Path, **options) -> set[str]:
    return set(failures(verify_adapter(folder, **options)))


def change(folder: Path, **fields) -> None:
    """Other fields in the manifest, which is written as we write it; '...' removes one."""
    found = {**json.loads((folder / MANIFEST_FILE).read_text()), **fields}
    found = {name: value for name, value in found.items() if value is not ...}
    (folder / MANIFEST_FILE).write_text(json.dumps(found, indent=2, sort_keys=True))


def redo(folder: Path, *, files: bool = True) -> Path:
    """As somebody who knows of the digests would, who leaves the manifest as we write it."""
    redigest(folder, files=files)
    change(folder)
    return folder


def test_all_is_well(original):
    checks = verify_adapter(original, model=make_model("llama"))
    assert [check.name for check in checks] == [
        "manifest", "digest", "files", "tensors", "peft", "loads", *SAID, "model", "signature"
    ]  # fmt: skip
    assert {check.name for check in checks if check.outcome != "ok"} == {"signature"}
    assert checks[-1].outcome == "not checked"
    assert all(check.detail for check in checks)


def test_there_are_as_many_files_as_are_tampered_with(original):
    assert {path.name for path in original.iterdir()} == {MANIFEST_FILE, *FILES}


FILES = {
    MODEL_FILE: {"files", "loads"},
    STATE_FILE: {"files", "loads"},
    PEFT_FILE: {"files", "loads"},
    RECORD: {"files"},
    CURVE: {"files"},
}


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_of_any_file(name, adapter):
    generator = random.Random(name)
    whole = (adapter / name).read_bytes()
    for _ in range(25):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        (adapter / name).write_bytes(damaged)
        assert FILES[name] <= failed(adapter)
    for damaged in (whole[:-1], whole + b"\0", b""):
        (adapter / name).write_bytes(damaged)
        assert FILES[name] <= failed(adapter)
    (adapter / name).unlink()
    assert "files" in failed(adapter)
    (adapter / name).write_bytes(whole)
    assert failed(adapter) == set()


def test_a_flipped_bit_of_the_manifest(adapter):
    """Also where the JSON says the same with it: an upper-case escape, a number in another notation."""
    generator = random.Random(0)
    path = adapter / MANIFEST_FILE
    whole = path.read_bytes()
    for _ in range(80):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        assert failed(adapter) & {"manifest", "digest"}
    path.write_bytes(whole)
    assert failed(adapter) == set()


@pytest.mark.parametrize(
    "fields",
    [
        {"task": "another"}, {"license": "MIT"}, {"intended_use": "Anything."}, {"data": {"sha256": "cd" * 32}},
        {"metrics": {"exact_match": 1.0}}, {"split": {"name": "test"}}, {"training": {"steps": 9}}, {"seed": 4},
        {"date": "2020-01-01T00:00:00Z"}, {"libraries": {"torch": "1"}}, {"tokenizer": {"class": "T"}},
        {"derived_from": [{"digest": "ab" * 32, "date": None, "data": None}]}, {"digest": "ab" * 32},
    ],
    ids=str,
)  # fmt: skip
def test_any_field_of_the_manifest(fields, adapter):
    change(adapter, **fields)
    assert "digest" in failed(adapter)
    if "digest" not in fields:
        redo(adapter)
        assert "digest" not in failed(adapter)  # what a signature is for


@pytest.mark.parametrize("name", SAID)
def test_what_is_not_said_is_named(name, adapter):
    empty = {"base_model": ..., "libraries": {}}.get(name)
    change(adapter, **{name: empty})
    if name == "metrics":
        change(adapter, split=None)
    redo(adapter)
    checks = {check.name: check for check in verify_adapter(adapter)}
    if name == "base_model":
        assert checks["manifest"].failed
        assert checks["base_model"].outcome == "not checked"
    else:
        assert failures(list(checks.values())) == [name]
        assert checks[name].detail == "not said"


def test_a_task_is_one(adapter, models, tmp_path):
    change(adapter, task=" ")
    assert failed(redo(adapter)) == {"task"}
    config = prefixcore.MultitaskPromptTuningConfig(3, num_tasks=2)
    with prefixcore.attach(make_model("llama"), config) as handle:
        folder = handle.save(tmp_path / "two", **SAID_OF_IT)
    assert {"task"} <= failed(folder)


def test_metrics_name_the_examples(adapter):
    change(adapter, split={"name": "test"})
    assert failed(redo(adapter)) == {"metrics"}


def test_a_field_that_stands_there_twice(adapter):
    path = adapter / MANIFEST_FILE
    path.write_text(path.read_text().replace('"license": ', '"license": "MIT",\n  "license": ', 1))
    assert failed(adapter) == {"manifest", "loads"}
    with pytest.raises(AdapterError, match="the field 'license' stands there twice"):
        read_adapter(adapter)


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        (MODEL_FILE, lambda t: {**t, "prompt_embeddings": t["prompt_embeddings"] * float("nan")}, {"tensors", "loads"}),
        (MODEL_FILE, lambda t: {"prompt_embeddings": t["prompt_embeddings"][:-1]}, {"tensors", "loads"}),
        (MODEL_FILE, lambda t: {**t, "more": torch.zeros(1)}, {"tensors", "loads"}),
        (MODEL_FILE, lambda t: {"prompt_embeddings": t["prompt_embeddings"] + 1}, {"loads"}),
        (STATE_FILE, lambda t: {name: tensor / 0 for name, tensor in t.items()}, {"tensors", "loads"}),
        (STATE_FILE, lambda t: {name: tensor + 1 for name, tensor in t.items()}, {"loads"}),
    ],
    ids=["nan", "shape", "more", "others than the state makes", "infinite state", "another state"],
)
def test_tensors_with_the_right_digest(name, make, expected, adapter):
    save_file({key: tensor.contiguous() for key, tensor in make(load_file(adapter / name)).items()}, adapter / name)
    assert failed(redo(adapter)) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"base_model_name_or_path": "another"}, {"peft"}),
        ({"num_virtual_tokens": 5}, {"peft", "tensors", "loads"}),
        ({"peft_type": "P_TUNING"}, {"peft", "tensors", "loads"}),
        ({"peft_type": "LORA"}, {"peft", "tensors", "loads"}),
        ({"num_layers": 1, "token_dim": 64}, {"peft", "loads"}),
    ],
    ids=["base model", "tokens", "another type", "a type of no prompt", "layers"],
)
def test_pefts_file_with_the_right_digest(changes, expected, adapter):
    path = adapter / PEFT_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert failed(redo(adapter)) == expected


@pytest.mark.parametrize("name", ["adapter_model.bin", "more.safetensors", "pytorch_model.pt", "modeling.py"])
def test_weights_or_code_of_another(name, adapter):
    (adapter / name).write_bytes(b"")
    checks = {check.name: check for check in verify_adapter(adapter)}
    assert failures(list(checks.values())) == ["files"]
    assert name in checks["files"].detail
    (adapter / name).rename(adapter / "README.md")
    assert failed(adapter) == set()


def test_a_name_in_the_manifest_leads_nowhere_else(adapter):
    (adapter.parent / "outside").write_text("")
    fields = json.loads((adapter / MANIFEST_FILE).read_text())
    change(adapter, files={**fields["files"], "../outside": {"bytes": 0, "sha256": "00" * 32}})
    assert {"files"} <= failed(adapter)


def test_another_base_model(adapter):
    checks = {check.name: check for check in verify_adapter(adapter, model=make_model("llama", seed=1))}
    assert failures(list(checks.values())) == ["model"]
    assert "other weights" in checks["model"].detail
    assert failed(adapter, model=make_model("gpt2")) == {"model"}


def test_what_says_little_is_told_what(models, tmp_path):
    save(tmp_path / "peft", "prefix", models["llama"], SHAPES["llama"])
    assert failed(tmp_path / "peft") == set(SAID) - {"base_model", "libraries", "date"}
    (tmp_path / "peft" / MANIFEST_FILE).unlink()
    assert failed(tmp_path / "peft") == {"manifest"}
    assert "digest" in failed(VERSION_1)
    (tmp_path / "empty").mkdir()
    assert failed(tmp_path / "empty") == {"manifest", "loads"}
    with pytest.raises(AdapterError, match="no such folder"):
        verify_adapter(tmp_path / "nothing")


@pytest.mark.parametrize("name", [MANIFEST_FILE, *FILES])
def test_files_that_are_none(name, adapter):
    for what in ("folder", "device", "link"):
        if (adapter / name).is_dir():
            (adapter / name).rmdir()
        else:
            (adapter / name).unlink()
        if what == "folder":
            (adapter / name).mkdir()
        else:
            (adapter / name).symlink_to("/dev/zero" if what == "device" else "nothing")
        assert failed(adapter) & {"manifest", "files"}


def test_a_name_is_no_model(original):
    with pytest.raises(TypeError, match=r"expected the base model itself.*got 'my-model'.*prefixcore verify ADAPTER"):
        verify_adapter(original, model="my-model")


def test_a_training_that_says_little_is_no_text(adapter):
    """What leaves data, metrics and seed out has to have been baked from a text, by its own record."""
    text = {"baked_method": "text", "baked_text_sha256": "ab" * 32, "baked_bos": False}
    unsaid = {"data": None, "metrics": None, "split": None, "seed": None}
    for training, derived_from, expected in (
        (text, None, set()),
        ({"baked_method": "text"}, None, {"data", "metrics", "seed"}),
        ({**text, "baked_method": "prompt"}, None, {"data", "metrics", "seed"}),
        ({**text, "steps": 60}, None, {"data", "metrics", "seed"}),
        (text, [{"digest": "cd" * 32, "date": None, "data": None}], {"data", "metrics", "seed"}),
        (None, None, {"data", "metrics", "seed", "training"}),
    ):
        change(adapter, training=training, derived_from=derived_from, **unsaid)
        assert failed(redo(adapter, files=False)) == expected, training
