"""LMCache chunks: the bytes that its own code makes of the same header, chunks of 256, and files that are none."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch

import prefixcore
from prefixcore.adapters import AdapterError, read_adapter
from prefixcore.adapters.formats import FORMATS

from .conftest import make_adapter

HEADER = bytes.fromhex("000c000001000000040000000200000002000000060000002000" + "0000")
"""`RemoteMetadata(3072, [Size([2, 2, 6, 32])], [torch.float32], KV_2LTD).serialize()` of lmcache 0.5.6."""


def test_the_bytes_of_a_chunk(prefix: Path, tmp_path: Path) -> None:
    prefixcore.export_adapter(prefix, "lmcache", tmp_path / "chunks")
    (path,) = (tmp_path / "chunks").iterdir()
    data = path.read_bytes()
    assert (path.name, data[:28]) == ("chunk-00000.data", HEADER)
    numbers = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32).view(2, 2, 6, 32)
    for layer, pair in enumerate(read_adapter(prefix).tensors):
        for i, tensor in enumerate(pair):
            assert torch.equal(numbers[i, layer], tensor.transpose(0, 1).flatten(1))


def test_a_chunk_for_each_256_tokens(model: Any, tmp_path: Path) -> None:
    config = prefixcore.PrefixTuningConfig(num_virtual_tokens=100, init="random", seed=0)
    make_adapter(model, config, tmp_path / "long")
    writer = FORMATS["lmcache"]
    from prefixcore.adapters.formats import contents_of, lmcache
    from prefixcore.hf.baking.converting import facts_of

    contents = contents_of(read_adapter(tmp_path / "long"))
    before, lmcache.CHUNK = lmcache.CHUNK, 32
    try:
        written = writer.write(contents, facts_of(model), torch.float32)
    finally:
        lmcache.CHUNK = before
    assert [struct.unpack_from("<7i", data)[5] for data in written.files.values()] == [32, 32, 32, 4]
    assert before == 256
    (tmp_path / "chunks").mkdir()
    for name, data in written.files.items():
        (tmp_path / "chunks" / name).write_bytes(data)
    back = writer.read(tmp_path / "chunks", facts_of(model)).prefix
    assert back is not None
    assert contents.prefix is not None
    assert all(
        torch.equal(a, b) for one, two in zip(contents.prefix, back, strict=True) for a, b in zip(one, two, strict=True)
    )


def header(**changes: int) -> bytes:
    values = {"length": 3072, "kind": 1, "code": 4, "two": 2, "layers": 2, "tokens": 6, "width": 32, **changes}
    return struct.pack("<7i", *values.values())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "shorter than its header"),
        (header() + b"\0" * 3071, "does not fit the 3071 bytes"),
        (header(length=3000) + b"\0" * 3072, "does not fit"),
        (header(kind=2) + b"\0" * 3072, "got format 2"),
        (header(code=6) + b"\0" * 3072, "dtype 6"),
        (header(two=1) + b"\0" * 3072, "does not fit"),
        (header(tokens=-6) + b"\0" * 3072, "does not fit"),
        (header(tokens=2**30) + b"\0" * 3072, "does not fit"),
        (header() + struct.pack("<f", float("nan")) * 768, "NaN or infinite"),
        (header(layers=4, tokens=3) + b"\0" * 3072, "chunks of 4 layers and width 32, but the model has 2"),
    ],
)
def test_what_does_not_fit_is_named(data: bytes, message: str, model: Any, tmp_path: Path) -> None:
    (tmp_path / "chunk.data").write_bytes(data)
    with pytest.raises(AdapterError, match=message):
        prefixcore.import_adapter(tmp_path / "chunk.data", "lmcache", tmp_path / "x", model=model)


def test_chunks_that_do_not_go_on(model: Any, tmp_path: Path) -> None:
    (tmp_path / "a.data").write_bytes(header() + b"\0" * 3072)
    (tmp_path / "b.data").write_bytes(header(layers=1, tokens=12) + b"\0" * 3072)
    with pytest.raises(AdapterError, match="does not go on from"):
        prefixcore.import_adapter(tmp_path, "lmcache", tmp_path / "x", model=model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="no chunks"):
        prefixcore.import_adapter(tmp_path / "empty", "lmcache", tmp_path / "x", model=model)
