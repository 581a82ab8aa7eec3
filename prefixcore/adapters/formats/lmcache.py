"""LMCache chunks: the keys and values of 256 tokens each, as its connectors keep them in files.

A file is a header of seven 32-bit integers (bytes that follow, format 1 `KV_2LTD`, dtype, four sizes) and the numbers
`[2, L, tokens, Hkv*D]`, keys before values. LMCache names a file by a key that it makes of the model's name and a hash
of the tokens, here placeholders, so whoever puts chunks into its store renames them.
"""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AdapterError, shown
from ..storage import naming
from .files import read_bytes
from .record import PREFIX, Contents, Facts, Written, all_layers, as_numbers, one_shape, rounded

CHUNK = 256
"""Tokens of a chunk, LMCache's default."""

_HEADER = struct.Struct("<7i")
_KV_2LTD = 1
_DTYPES = {1: torch.float16, 2: torch.float16, 3: torch.bfloat16, 4: torch.float32, 5: torch.float64}


class LmCache:
    """Files of LMCache 0.5, one a chunk, in a folder."""

    name = "lmcache"
    title = "LMCache chunks"
    kinds: tuple[str, ...] = (PREFIX,)
    is_folder = True
    position_offset = True
    needs_model = False
    layout = "folder of chunk-00000.data, ...: header, then [2, L, tokens, Hkv*D]"
    lost = "manifest, heads, the number of heads; LMCache's key, a hash of the placeholder tokens, names the files"

    def read(self, source: Path, facts: Facts) -> Contents:
        """The chunks of a folder in the order of their names, or one file. The model says how many heads there are."""
        if facts.shapes is None:
            raise AdapterError(f"{source}: chunks do not say how many heads there are: give the model (--model)")
        try:
            paths = sorted(source.glob("*.data")) if source.is_dir() else [source]
        except OSError as error:
            raise AdapterError(f"{source}: cannot be read: {error.strerror or error}") from error
        if not paths:
            raise AdapterError(f"{source}: no chunks: expected files of the name *.data")
        chunks = [_read_chunk(path) for path in paths]
        for path, chunk in zip(paths, chunks, strict=True):
            if (chunk.shape[1], chunk.shape[3]) != (chunks[0].shape[1], chunks[0].shape[3]):
                raise AdapterError(f"{path}: shape {list(chunk.shape)} does not go on from {list(chunks[0].shape)}")
        both = torch.cat(chunks, 2)
        with naming(source):
            shapes = list(facts.shapes)
            one_shape(
                [
                    (torch.empty(s.num_kv_heads, 0, s.key_dim), torch.empty(s.num_kv_heads, 0, s.value_dim))
                    for s in shapes
                ],
                self.title,
            )
            if (len(shapes), shapes[0].key_width) != (both.shape[1], both.shape[3]):
                raise AdapterError(
                    f"chunks of {both.shape[1]} layers and width {both.shape[3]}, but the model has {len(shapes)} "
                    f"layers of width {shapes[0].key_width}"
                )
        split = both.unflatten(3, (shapes[0].num_kv_heads, shapes[0].key_dim)).transpose(2, 3).contiguous()
        return Contents(prefix=list(zip(split[0].unbind(), split[1].unbind(), strict=True)))

    def write(self, contents: Contents, facts: Facts, dtype: torch.dtype) -> Written:
        """One file for each 256 virtual tokens."""
        prefix = all_layers(contents, self.title)
        one_shape(prefix, self.title)
        sides = [torch.stack([pair[i].transpose(0, 1).flatten(1) for pair in prefix]) for i in (0, 1)]
        both = rounded("prefix", torch.stack(sides), dtype)
        files = {f"chunk-{i:05d}.data": _chunk_bytes(chunk) for i, chunk in enumerate(both.split(CHUNK, 2))}
        return Written(files)


def _chunk_bytes(chunk: Tensor) -> bytes:
    code = next(code for code, dtype in reversed(_DTYPES.items()) if dtype == chunk.dtype)
    numbers = chunk.contiguous().view(torch.uint8).numpy().tobytes()
    return _HEADER.pack(len(numbers), _KV_2LTD, code, *chunk.shape) + numbers


def _read_chunk(path: Path) -> Tensor:
    data = read_bytes(path)
    with naming(path):
        if len(data) < _HEADER.size:
            raise AdapterError("not a chunk: shorter than its header")
        length, kind, code, *shape = _HEADER.unpack_from(data)
        if kind != _KV_2LTD or code not in _DTYPES:
            raise AdapterError(
                f"expected format {_KV_2LTD} (KV_2LTD) of floating-point numbers, got format {kind}, dtype {code}"
            )
        dtype = _DTYPES[code]
        claimed = dtype.itemsize
        for size in shape:
            claimed *= size
        if min(shape) < 1 or shape[0] != 2 or not length == claimed == len(data) - _HEADER.size:
            raise AdapterError(
                f"shape {shown(shape)} of {dtype} does not fit the {len(data) - _HEADER.size} bytes behind its header"
            )
        numbers = torch.frombuffer(bytearray(data), dtype=dtype, offset=_HEADER.size).view(shape)
        return as_numbers("chunk", numbers, shape)
