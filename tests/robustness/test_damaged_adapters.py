"""A damaged adapter is refused by name and leaves the model alone, or works: random damage to fields and bytes."""

from __future__ import annotations

import json
import random
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import prefixcore
from prefixcore import AdapterError
from prefixcore.adapters import read_record
from prefixcore.adapters.tensors import TensorFile

from ..hf.models import assert_same, state
from .adapter_folders import MANIFEST, MODEL, PEFT, RECORD, STATE, refused

CASES = 400
"""How many damaged adapters, and damaged headers."""

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
