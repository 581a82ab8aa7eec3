"""A load that is refused raises AdapterError, names the file, has read no number and leaves the model as it was."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import prefixcore
from prefixcore import AdapterError
from prefixcore.adapters import read_adapter, read_record, tensors, write_adapter
from prefixcore.adapters.manifest import Manifest
from prefixcore.adapters.tensors import TensorFile

from ..adapters.models import CONFIGS, SHAPES, make_model, make_module
from ..hf.models import assert_same, state

ROOT = Path(__file__).parents[2]
MODEL, STATE = "adapter_model.safetensors", "training_state.safetensors"
PEFT, MANIFEST, RECORD = "adapter_config.json", "prefixcore_manifest.json", "training.json"
CASES = 400
"""How many damaged adapters, and damaged headers."""

KINDS = {
    "ours": "prefix-basis",
    "peft": "prefix",
    "frozen": "prefix-frozen",
    "mlp": "prefix-mlp",
    "prompt": "prompt",
    "lstm": "p-tuning-lstm",
}
NOT_BY_PREFIXCORE = ("peft", "prompt")
"""Kinds of which a copy without manifest is there too, as PEFT would have written it."""


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


@pytest.fixture(scope="module")
def kinds(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    record = {
        "model": "m",
        "data": "d.jsonl",
        "end": "\n",
        "split": {"seed": 1, "fraction": 0.1},
        "held_out": {"bare model": {"loss": 1.0, "exact_match": 0.5, "examples": 3}},
        "train_loss": [[1, 2.0]],
        "held_out_loss": [],
        "interrupted": False,
    }
    folders = {}
    for kind, name in KINDS.items():
        config = CONFIGS[name]
        prefix = isinstance(config, prefixcore.PrefixTuningConfig)
        shapes = SHAPES["llama"] if prefix else []
        manifest = Manifest.create(model, config, shapes if prefix else None, task="a task")
        module = make_module(config, shapes)
        folders[kind] = write_adapter(root / kind, module=module, config=config, manifest=manifest, record=record)
    for kind in NOT_BY_PREFIXCORE:
        folders[f"{kind} alone"] = shutil.copytree(root / kind, root / f"{kind} alone")
        (folders[f"{kind} alone"] / MANIFEST).unlink()
    return folders


@pytest.fixture
def copy_of(kinds: dict[str, Path], tmp_path: Path) -> Any:
    def copied(kind: str) -> Path:
        shutil.rmtree(tmp_path / kind, ignore_errors=True)
        return shutil.copytree(kinds[kind], tmp_path / kind)

    return copied


@pytest.fixture
def no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which a number is read."""

    def read(self: TensorFile, *args: Any) -> Any:
        raise AssertionError(f"numbers of {self.path} were read")

    monkeypatch.setattr(TensorFile, "read_pieces", read)


def refused(model: Any, folder: Path, *names: str, trainable: bool = False) -> str:
    before = state(model)
    with pytest.raises(AdapterError) as caught:
        prefixcore.load(model, folder, trainable=trainable)
    assert_same(before, state(model))
    message = str(caught.value)
    assert any(name in message for name in names), message
    assert message.isprintable()
    assert len(message) < 2000
    return message


# --- Refused before any number is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, *(f"{kind} alone" for kind in NOT_BY_PREFIXCORE)])
def test_another_model_is_refused_by_the_headers(
    kind: str, trainable: bool, kinds: dict[str, Path], no_numbers: None
) -> None:
    changes = {"hidden_size": 64, "num_key_value_heads": 1}
    message = refused(make_model("llama", **changes), kinds[kind], kind, trainable=trainable)
    assert "model has" in message or "embeddings have" in message


def test_other_weights_are_refused_by_the_manifest(kinds: dict[str, Path], no_numbers: None) -> None:
    assert "other weights" in refused(make_model("llama", seed=3), kinds["ours"], MANIFEST)


@pytest.mark.parametrize("file", [MODEL, STATE])
def test_a_header_that_is_not_the_manifests_is_refused_before_its_numbers(
    file: str, model: Any, copy_of: Any, no_numbers: None
) -> None:
    folder = copy_of("ours")
    (folder / file).write_bytes((folder / file).read_bytes()[:-4])
    refused(model, folder, file)
    folder = copy_of("peft alone")
    save_file({"prompt_embeddings": torch.zeros(5, 127)}, folder / MODEL)
    refused(model, folder, MODEL)


def test_a_training_state_is_hashed_but_not_read_by_a_load_that_does_not_train(
    model: Any, copy_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read = copy_of("mlp"), []
    original = TensorFile.read_pieces

    def spy(self: TensorFile, *args: Any, **kwargs: Any) -> None:
        read.append(self.path.name)
        original(self, *args, **kwargs)

    monkeypatch.setattr(TensorFile, "read_pieces", spy)
    prefixcore.load(model, folder).detach()
    assert read == [MODEL]
    prefixcore.load(model, folder, trainable=True).detach()
    assert read == [MODEL, MODEL, STATE]
    data = bytearray((folder / STATE).read_bytes())
    data[-3] ^= 1
    (folder / STATE).write_bytes(data)
    read.clear()
    refused(model, folder, STATE)
    assert read == []
    refused(model, folder, STATE, trainable=True)


# --- Entries that are no files ---------------------------------------------------------------------------------------


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def nowhere(path: Path) -> None:
    path.symlink_to("not-there")


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


OTHERS = {"loop": loop, "nowhere": nowhere, "endless": endless, "pipe": os.mkfifo, "folder": Path.mkdir}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("file", [MANIFEST, PEFT, MODEL, STATE])
def test_what_is_there_but_no_file_is_not_absent(what: str, file: str, model: Any, copy_of: Any) -> None:
    """Without its manifest, PEFT's two files would load on any weights."""
    folder = copy_of("mlp")
    (folder / file).unlink()
    OTHERS[what](folder / file)
    refused(model, folder, file)
    refused(make_model("llama", seed=3), folder, file)


@pytest.mark.parametrize("what", OTHERS)
def test_a_record_that_is_no_file(what: str, copy_of: Any) -> None:
    folder = copy_of("peft")
    (folder / RECORD).unlink()
    OTHERS[what](folder / RECORD)
    with pytest.raises(AdapterError, match=RECORD):
        read_record(folder)


def test_links_to_files_are_read(model: Any, kinds: dict[str, Path], tmp_path: Path) -> None:
    """As in the cache of a hub."""
    for path in kinds["mlp"].iterdir():
        (tmp_path / path.name).symlink_to(path)
    with prefixcore.load(model, tmp_path, trainable=True) as handle:
        assert handle.num_virtual_tokens == 5


@pytest.mark.parametrize("file", ["", MANIFEST, PEFT, MODEL, STATE])
def test_what_may_not_be_read(file: str, model: Any, copy_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of("mlp")
    if os.geteuid() == 0:  # who may read everything: the system refuses by hand
        real = os.stat

        def stat(path: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(path, int) and Path(path) == folder / file:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(os, "stat", stat)
        refused(model, folder, "cannot be read: Permission denied")
    else:
        (folder / file).chmod(0)
        try:
            refused(model, folder, "cannot be read: Permission denied")
        finally:
            (folder / file).chmod(0o700)


# --- Wrong fields ----------------------------------------------------------------------------------------------------

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**300,
    10**4200,
    0.0,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 5000,
    "\ud800",
    "\x1b[2J\n",
    [],
    [0],
    [0.0],
    [[]],
    [None, 1],
    {},
    {"a": {"b": []}},
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value inside a JSON value stands."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def mutate_json(text: bytes, generator: random.Random) -> tuple[bytes, str]:
    """One value of a JSON file replaced, removed, or put where nothing was."""
    fields = json.loads(text)
    *path, last = generator.choice(list(places(fields)))
    inside = fields
    for key in path:
        inside = inside[key]
    how = generator.random()
    value = nested(generator.choice((5, 500))) if how > 0.95 else generator.choice(VALUES)
    if how < 0.1:
        del inside[last]
        what = "removed"
    elif how < 0.2 and isinstance(inside, dict):
        inside[generator.choice(("new\x1b", "\ud800", "init_weights"))] = value
        what = "beside it something new"
    else:
        inside[last] = value
        what = repr(value)[:40]
    return json.dumps(fields).encode(), f"{'.'.join(map(str, (*path, last)))}: {what}"


def mutate_bytes(data: bytes, generator: random.Random) -> tuple[bytes, str]:
    """Bytes cut off, flipped or written over, half of them where a header is."""
    end = generator.choice((min(len(data), 200), len(data)))
    at = generator.randrange(end)
    if generator.random() < 0.3:
        return data[:at], f"cut at {at}"
    changed = bytearray(data)
    if generator.random() < 0.5:
        changed[at] ^= 1 << generator.randrange(8)
    else:
        some = generator.choice((b"\xff" * 8, b"\0" * 8, b"9" * 40, b'"', b"}{"))
        changed[at : at + len(some)] = some
    return bytes(changed), f"changed at {at}"


def check_record(folder: Path, where: str) -> None:
    """A record that is read is one that can be shown."""
    record = read_record(folder)
    for result in record.get("held_out", {}).values():
        assert f"{result['loss']:.3f} {result['exact_match']:.1%}", where
    assert isinstance(record.get("end"), (str, type(None))), where


@pytest.mark.parametrize("part", [*range(4), *(pytest.param(part, marks=pytest.mark.slow) for part in range(4, 54))])
def test_fuzz(part: int, model: Any, kinds: dict[str, Path], tmp_path: Path) -> None:
    """AdapterError that names a file of the adapter and leaves the model alone, or an adapter that works."""
    generator = random.Random(part)
    ids = torch.arange(3, 9)[None]
    before = state(model)
    count = dict.fromkeys(("refused", "loaded", "record"), 0)
    for case in range(CASES // 4):
        kind = generator.choice(list(kinds))
        folder = shutil.copytree(kinds[kind], tmp_path / f"{case}")
        path = generator.choice(sorted(folder.glob("*.*")))
        by_field = path.suffix == ".json" and generator.random() < 0.8
        data, what = (mutate_json if by_field else mutate_bytes)(path.read_bytes(), generator)
        path.write_bytes(data)
        where = f"case {case} of part {part}: {kind}, {path.name}, {what}"
        count["record" if path.name == RECORD else "loaded"] += 1
        try:
            if path.name == RECORD:
                check_record(folder, where)
                continue
            handle = prefixcore.load(model, folder, trainable=generator.random() < 0.5)
        except AdapterError as error:
            message = str(error)
            count["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        else:
            message = f"{path.name} was taken"
            assert torch.isfinite(model(ids).logits).all(), where
            handle.detach()
        finally:
            shutil.rmtree(folder)
        assert any(name in message for name in (path.name, MODEL, STATE, PEFT, MANIFEST)), f"{where}: {message}"
        assert message.isprintable(), where
        assert len(message) < 2000, where
    torch.set_rng_state(before["rng"])
    assert_same(before, state(model))
    assert count["loaded"] > count["refused"] - count["record"] > CASES // 20, count


def test_headers_are_read_as_safetensors_reads_them(kinds: dict[str, Path], tmp_path: Path) -> None:
    """What our reader takes, theirs takes, and finds the same numbers."""
    generator, path = random.Random(7), tmp_path / "file.safetensors"
    whole = (kinds["lstm"] / STATE).read_bytes()
    taken = 0
    for _ in range(CASES):
        path.write_bytes(mutate_bytes(whole, generator)[0])
        try:
            with TensorFile(path) as file:
                ours = file.read(dtype=None)
        except AdapterError:
            continue
        taken += 1
        try:
            theirs = load_file(path)
        except SafetensorError as error:
            raise AssertionError("taken by us alone") from error
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert taken > CASES // 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("piece", [4, 60, 2**20])
def test_numbers_are_read_in_pieces_of_any_size(
    dtype: torch.dtype, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "PIECE", piece)
    expected = {
        "b": torch.randn(3, 5).to(dtype),
        "a": torch.randn(7).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "one": torch.tensor(2.5, dtype=dtype),
    }
    save_file(expected, tmp_path / "file")
    with TensorFile(tmp_path / "file") as file:
        read, rounded = file.read(dtype=None), file.read()
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor)
        assert torch.equal(rounded[name], tensor.float())


def test_peft_files_are_read_in_pieces_of_any_size(kinds: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_adapter(kinds["peft alone"]).tensors
    for piece in (1, 600, 1200):
        monkeypatch.setattr(tensors, "PIECE", piece)
        for pair, reference in zip(read_adapter(kinds["peft alone"]).tensors, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(pair, reference, strict=True))


@pytest.mark.parametrize("size", [2**31, 2**62, 10**300, 10**4200])
@pytest.mark.parametrize("field", ["num_layers", "num_virtual_tokens", "token_dim", "num_attention_heads"])
@pytest.mark.parametrize("kind", ["peft", "peft alone"])
def test_a_claimed_size_takes_no_memory(kind: str, field: str, size: int, model: Any, copy_of: Any) -> None:
    """A list of 2**31 layers would take 17 GB before the file's header shows that there are two."""
    folder = copy_of(kind)
    fields = json.loads((folder / PEFT).read_text())
    (folder / PEFT).write_text(json.dumps({**fields, field: size}))
    tracemalloc.start()
    try:
        refused(model, folder, PEFT, MODEL)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


# --- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak of memory that can be reset")
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("ours", "load"), ("peft", "load"), ("peft", "train"), ("prompt", "load"), ("state", "load"),
        ("state", "train"), *(
            pytest.param(kind, how, marks=pytest.mark.slow)
            for kind, how in (("state", "read"), ("basis", "train"), ("prompt state", "train"), ("mlp", "train"))
        ),
    ],
)  # fmt: skip
def test_a_load_takes_the_memory_of_its_numbers(kind: str, how: str) -> None:
    """Not that of two or three copies: 64 MB of values, and what a process needs besides.

    A training state has them again, as initial values or as what makes them; a random basis makes its signs besides.
    """
    command = [sys.executable, "-m", "tests.robustness.memory", kind, "64", how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    needed = 64 * 2**20 if how == "load" else measured["files"]
    assert measured["rise"] > 0.9 * 64 * 2**20  # it was there at all
    assert measured["rise"] < (1.9 if kind == "basis" else 1.3) * needed
