"""Damaged and foreign files: an AdapterError that names the file, and nothing else."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefixcore.adapters import AdapterError, read_adapter
from prefixcore.adapters.fingerprint import FACTS
from prefixcore.adapters.storage import describe
from tests.redigest import redigest

from .models import SHAPES, UNEVEN, contents, flat, save

MODEL, STATE = "adapter_model.safetensors", "training_state.safetensors"
PEFT, MANIFEST = "adapter_config.json", "prefixcore_manifest.json"


@pytest.fixture(scope="module")
def kinds(models, tmp_path_factory):
    """Adapters with every sort of file in them."""
    root = tmp_path_factory.mktemp("adapters")
    save(root / "ours", "prefix-low-rank", models["llama"], SHAPES["llama"])
    save(root / "uneven", "prefix-mlp", models["llama"], UNEVEN)
    save(root / "prompt", "p-tuning-lstm", models["llama"], [])
    save(root / "peft", "prefix", models["llama"], SHAPES["llama"])
    (root / "peft" / MANIFEST).unlink()  # now as PEFT would have written it
    return root


@pytest.fixture
def copy_of(kinds, tmp_path):
    def copied(kind):
        return shutil.copytree(kinds / kind, tmp_path / kind)

    return copied


def _each_file(kinds):
    return [(kind.name, path.name) for kind in sorted(kinds.iterdir()) for path in sorted(kind.iterdir())]


def _refused(folder: Path, *names: str) -> str:
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    assert any(name in str(caught.value) for name in names), str(caught.value)
    return str(caught.value)


def test_all_kinds_are_readable(kinds):
    for kind in kinds.iterdir():
        assert flat(read_adapter(kind).tensors)


def test_truncated_anywhere(kinds, copy_of):
    for kind, name in _each_file(kinds):
        folder = copy_of(kind)
        whole = (folder / name).read_bytes()
        for length in sorted({0, 1, 7, 8, 9, *range(0, len(whole), 1 + len(whole) // 60), len(whole) - 1}):
            (folder / name).write_bytes(whole[:length])
            _refused(folder, name)
        (folder / name).write_bytes(whole)
        read_adapter(folder)
        shutil.rmtree(folder)


def test_a_flipped_bit_in_a_tensor_file_of_ours_is_seen(kinds, copy_of):
    generator = random.Random(0)
    for kind, name in _each_file(kinds):
        if kind == "peft" or not name.endswith("safetensors"):
            continue
        folder = copy_of(kind)
        whole = (folder / name).read_bytes()
        for _ in range(25):
            damaged = bytearray(whole)
            damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
            (folder / name).write_bytes(damaged)
            _refused(folder, name)
        shutil.rmtree(folder)


def test_damage_that_no_digest_covers_never_raises_anything_else(kinds, copy_of):
    """JSON files, and everything in PEFT's folders: what can be read has the right shapes and finite numbers."""
    generator = random.Random(1)
    refused = 0
    for kind, name in _each_file(kinds):
        if kind != "peft" and name.endswith("safetensors"):
            continue
        folder = copy_of(kind)
        shapes = [t.shape for t in flat(read_adapter(folder).tensors)]
        whole = (folder / name).read_bytes()
        for _ in range(120):
            damaged = bytearray(whole)
            # Half of the damage near the beginning, where a safetensors file has its header.
            end = len(whole) if generator.random() < 0.5 else min(120, len(whole))
            damaged[generator.randrange(end)] = generator.randrange(256)
            (folder / name).write_bytes(damaged)
            try:
                tensors = flat(read_adapter(folder).tensors)
            except AdapterError:
                refused += 1
            else:
                assert [t.shape for t in tensors] == shapes
                assert all(torch.isfinite(t).all() for t in tensors)
        shutil.rmtree(folder)
    assert refused > 100


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN}'])
def test_json_garbage(garbage, kinds, copy_of):
    for kind, name in _each_file(kinds):
        if name.endswith("json"):
            folder = copy_of(kind)
            (folder / name).write_bytes(garbage)
            _refused(folder, name)
            shutil.rmtree(folder)


class Bomb:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_is_not_opened_under_any_name(protocol, kinds, copy_of, tmp_path):
    for kind, name in _each_file(kinds):
        folder = copy_of(kind)
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "boom"), protocol))
        _refused(folder, name)
        shutil.rmtree(folder)
    assert not (tmp_path / "boom").exists()


def test_missing_files(kinds, copy_of):
    for kind, name in _each_file(kinds):
        folder = copy_of(kind)
        (folder / name).unlink()
        if (kind, name) in (("ours", MANIFEST), ("prompt", MANIFEST)):
            assert read_adapter(folder).manifest is None  # what is left is a PEFT adapter
        else:
            _refused(folder, name, "not an adapter")
        shutil.rmtree(folder)


def test_no_adapter_at_all(tmp_path):
    assert "no such folder" in _refused(tmp_path / "nothing", "nothing")
    assert "not an adapter" in _refused(tmp_path, str(tmp_path))
    (tmp_path / "file").write_text("")
    assert "is a file; give the adapter's folder" in _refused(tmp_path / "file", "file")
    assert "no such folder" in _refused(tmp_path / "someone" / "adapter", "adapter")


def test_files_of_another_adapter(models, kinds, copy_of, tmp_path):
    save(tmp_path / "other", "prefix-low-rank", models["llama"], SHAPES["llama"])
    other = contents(tmp_path / "other")
    with torch.no_grad():
        changed = load_file(tmp_path / "other" / MODEL)
        changed["prompt_embeddings"][0, 0] += 1
    save_file(changed, tmp_path / "changed.safetensors")
    assert len((tmp_path / "changed.safetensors").read_bytes()) >= len(changed)
    folder = copy_of("ours")
    (folder / MODEL).write_bytes((tmp_path / "changed.safetensors").read_bytes())
    _refused(folder, MODEL)
    (folder / MODEL).write_bytes(other[MODEL])
    read_adapter(folder)  # the same adapter written twice has the same bytes
    (folder / PEFT).write_bytes((kinds / "prompt" / PEFT).read_bytes())
    assert "is 'P_TUNING'" in _refused(folder, PEFT)


PEFT_CHANGES = {
    "missing": (lambda t: {}, "prompt_embeddings: missing"),
    "foreign": (lambda t: {"weight": torch.zeros(2)}, "prompt_embeddings: missing"),
    "extra": (lambda t: {**t, "lm_head.weight": torch.zeros(2)}, "lm_head.weight: unknown tensor"),
    "shape": (
        lambda t: {"prompt_embeddings": t["prompt_embeddings"][:, :-1].contiguous()},
        "prompt_embeddings: expected shape [5, 128], got [5, 127]",
    ),
    "rank": (lambda t: {"prompt_embeddings": t["prompt_embeddings"][None]}, "expected shape [5, 128]"),
    "integers": (lambda t: {"prompt_embeddings": t["prompt_embeddings"].int()}, "expected one of the dtypes"),
    "float8": (
        lambda t: {"prompt_embeddings": t["prompt_embeddings"].to(torch.float8_e4m3fn)},
        "expected one of the dtypes",
    ),
    "nan": (lambda t: {"prompt_embeddings": t["prompt_embeddings"] * float("nan")}, "NaN or infinite"),
    "infinite": (lambda t: {"prompt_embeddings": t["prompt_embeddings"] / 0}, "NaN or infinite"),
    "beyond fp32": (
        lambda t: {"prompt_embeddings": torch.full((5, 128), 1e300, dtype=torch.float64)},
        "NaN or infinite",
    ),
}


@pytest.mark.parametrize("change", PEFT_CHANGES)
def test_wrong_tensors(change, copy_of):
    folder = copy_of("peft")
    make, message = PEFT_CHANGES[change]
    save_file(make(load_file(folder / MODEL)), folder / MODEL)
    assert message in _refused(folder, MODEL)


def _rewrite(folder: Path, name: str, **changes):
    """Change fields of the manifest, as somebody would who knows of the digest; '...' removes one."""
    fields = {**json.loads((folder / name).read_text()), **changes}
    (folder / name).write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))
    redigest(folder, files=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "format_version: expected 1 or 2, got 3"),
        ({"format_version": True}, "format_version: expected 1 or 2, got True"),
        ({"format_version": ...}, "format_version: expected 1 or 2, got None"),
        ({"format_version": 1}, "data: unknown field"),
        *[({name: ...}, f"{name}: missing") for name in ("method", "config", "base_model", "task", "layers")],
        *[({name: 5}, f"{name}: expected") for name in ("method", "config", "libraries", "tokenizer", "files")],
        ({"method": "lora"}, "method: expected one of"),
        ({"method": "p-tuning"}, "config: "),
        ({"surprise": 1}, "surprise: unknown field"),
        ({"peft_type": None}, "peft_type: None, but that of adapter_config.json is 'CARTRIDGE'"),
        ({"base_model": {}}, "base_model.class: missing"),
        ({"base_model": dict.fromkeys(FACTS)}, "base_model.weights: missing"),
        ({"base_model": {**dict.fromkeys(FACTS), "weights": "abc"}}, "base_model.weights: expected digests"),
        ({"config": {}}, "config: "),
        ({"config": {"num_virtual_tokens": 5, "no_such": 1}}, "config: "),
        ({"config": {"num_virtual_tokens": 5, "rank": "many"}}, "config: rank must be"),
        ({"config": {"init": "text", "init_text": "abc"}}, "config.num_virtual_tokens: missing"),
        ({"layers": [0]}, "layers: [0] does not agree"),
        ({"layers": [1, 0]}, "layers: [1, 0] does not agree"),
        ({"layers": None}, "layers: None does not agree"),
        ({"layer_shapes": [[2, 16, 16]]}, "layers: [0, 1] does not agree"),
        ({"layer_shapes": [[2, 16], [2, 16]]}, "layer_shapes: expected [Hkv, D, Dv]"),
        ({"layer_shapes": [[2, 16, 0], [2, 16, 16]]}, "layer_shapes: expected [Hkv, D, Dv]"),
        ({"layer_shapes": None}, "layer_shapes: expected [Hkv, D, Dv]"),
        ({"layer_shapes": [[4, 16, 16]] * 2}, "do not agree with adapter_model.safetensors"),
        ({"files": {}}, "files: expected"),
        ({"files": {MODEL: 3, STATE: 3, PEFT: 3}}, "files.adapter_model.safetensors: expected bytes and sha256"),
        ({"config": {"num_virtual_tokens": 5, "init": "zero"}}, "files: expected ['adapter_config.json', 'ad"),
    ],
)
def test_a_wrong_field_of_the_manifest_is_named(changes, message, copy_of):
    folder = copy_of("ours")
    _rewrite(folder, MANIFEST, **changes)
    assert message in _refused(folder, MANIFEST)


@pytest.mark.parametrize("kind", ["uneven", "prompt"])
def test_manifest_and_values_must_agree(kind, copy_of):
    folder = copy_of(kind)
    config = json.loads((folder / MANIFEST).read_text())["config"]
    _rewrite(folder, MANIFEST, config={**config, "num_virtual_tokens": 6})
    _refused(folder, MODEL, MANIFEST)


def test_a_training_state_of_another_shape_seed_or_config(copy_of, models, tmp_path):
    folder = copy_of("ours")
    config = json.loads((folder / MANIFEST).read_text())["config"]
    _rewrite(folder, MANIFEST, config={**config, "rank": 3})
    assert "reparameterization.left.0: expected shape [4, 3], got [4, 2]" in _refused(folder, STATE)
    _rewrite(folder, MANIFEST, config={**config, "num_frozen_tokens": 0})
    assert "frozen.0.key: unknown tensor" in _refused(folder, STATE)
    _rewrite(folder, MANIFEST, config={**config, "rank": 100})
    assert "config: rank 100 is not low" in _refused(folder, STATE)

    save(tmp_path / "basis", "prefix-basis", models["llama"], SHAPES["llama"])
    config = json.loads((tmp_path / "basis" / MANIFEST).read_text())["config"]
    _rewrite(tmp_path / "basis", MANIFEST, config={**config, "seed": 2})
    assert "does not make the virtual tokens" in _refused(tmp_path / "basis", STATE)


@pytest.mark.parametrize("size", [10**7, 10**12, 10**30])
@pytest.mark.parametrize(
    ("kind", "field"),
    [("uneven", "encoder_hidden_size"), ("prompt", "encoder_hidden_size"), ("prompt", "encoder_num_layers")],
)
def test_an_encoder_of_any_size_takes_no_memory(kind, field, size, copy_of):
    """What a manifest claims is held against the state's tensors before a module of that size is made."""
    folder = copy_of(kind)
    config = json.loads((folder / MANIFEST).read_text())["config"]
    _rewrite(folder, MANIFEST, config={**config, field: size})
    _refused(folder, STATE)


def test_a_state_without_its_start_is_named(copy_of):
    folder = copy_of("prompt")
    state = load_file(folder / STATE)
    del state["initial"]
    save_file(state, folder / STATE)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][STATE] = describe((folder / STATE).read_bytes())
    (folder / MANIFEST).write_text(json.dumps(manifest))
    redigest(folder)
    assert "initial: missing" in _refused(folder, STATE)


@pytest.mark.parametrize("name", [PEFT, MANIFEST])
@pytest.mark.parametrize("what", ["too long", "folder", "pipe", "device"])
def test_json_that_is_endless_or_no_file_is_not_read(name, what, copy_of):
    path = copy_of("peft" if name == PEFT else "ours") / name
    path.unlink()
    if what == "too long":
        path.write_bytes(b'{"a": [' + b"1," * 2**21 + b"1]}")
    elif what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    assert ("at most" if what == "too long" else "not a file") in _refused(path.parent, name)
