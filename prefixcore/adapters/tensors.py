"""Reading a safetensors file: its header first, its numbers in pieces, each byte once and into its place.

Not through safetensors' own reader, which maps the file into memory: the mapped pages and the copy made of them are
together twice the file, and what is hashed is not for certain what is copied.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .errors import AdapterError, shown
from .storage import LONGEST_JSON, PIECE, check_digest, check_size, open_file, parse_json

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file's header.

    Attributes:
        name, dtype, shape: the tensor's.
        start, stop: where its bytes lie, counted from the end of the header.
    """

    name: str
    dtype: torch.dtype
    shape: list[int]
    start: int
    stop: int


class TensorFile:
    """An open safetensors file whose header has been read and checked, and none of its numbers.

    A file that is replaced or renamed while it is open stays the one that was opened.

    Attributes:
        path: the file.
        entries: its tensors, in the order of their bytes.
        size: of the file, in bytes.
        sha256: of the whole file, once its numbers have been read; None before.

    Raises:
        AdapterError: the file is missing, too short, or its header is not that of a whole safetensors file of
            floating-point tensors.
    """

    def __init__(self, path: Path, described: Mapping[str, Any] | None = None) -> None:
        """Opens the file; `described` is the size and digest that it must have, as the manifest states them."""
        self.path, self._described = path, described
        self.sha256: str | None = None
        file = open_file(path)
        if file is None:
            raise AdapterError(f"{path}: missing")
        self._file = file
        try:
            size = self.size = os.fstat(file.fileno()).st_size
            if described is not None:
                check_size(path, size, described)
            self._header = self._read_header(size)
            self.entries = self._parse(size)
        except BaseException:
            file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shape of each tensor by its name."""
        return {entry.name: entry.shape for entry in self.entries}

    def check_shapes(self, shapes: Mapping[str, list[int]]) -> None:
        """Raises AdapterError unless the file holds tensors of these names and shapes, and no others."""
        found = self.shapes
        for name in sorted(found.keys() ^ shapes.keys()):
            raise AdapterError(f"{self.path}: {name}: {'missing' if name in shapes else 'unknown tensor'}")
        for name, shape in found.items():
            if shape != shapes[name]:
                raise AdapterError(f"{self.path}: {name}: expected shape {shown(shapes[name])}, got {shown(shape)}")

    def check_digest(self) -> None:
        """Hashes the whole file in pieces; AdapterError: its digest is not the one that it must have."""
        if self._described is None:
            return
        check_digest(self.path, self.hash(), self._described)

    def hash(self) -> str:
        """The SHA-256 of the whole file."""
        digest = hashlib.sha256(self._header)
        self._file.seek(len(self._header))
        while piece := self._file.read(PIECE):
            digest.update(piece)
        self.sha256 = digest.hexdigest()
        return self.sha256

    def read(self, dtype: torch.dtype | None = torch.float32) -> dict[str, Tensor]:
        """All tensors, in memory of their own; `dtype` None: in the dtypes that they have in the file."""
        tensors = {e.name: torch.empty(e.shape, dtype=dtype or e.dtype) for e in self.entries}
        flat = {name: tensor.view(-1) for name, tensor in tensors.items()}

        def place(name: str, start: int, numbers: Tensor) -> None:
            flat[name][start : start + len(numbers)] = numbers

        self.read_pieces(place, dtype)
        return tensors

    def read_pieces(
        self, place: Callable[[str, int, Tensor], None], dtype: torch.dtype | None = torch.float32, multiple: int = 1
    ) -> None:
        """Reads every number once, in the order of the file, and the digest of what was read.

        Args:
            place: called with a tensor's name, the index of the first of these numbers in it, and the numbers, which
                are overwritten afterwards.
            dtype: what the numbers are rounded to first; None: nothing.
            multiple: pieces begin at multiples of so many numbers.

        Raises:
            AdapterError: a number is not finite, the digest is not the one that the file must have, or the file has
                become shorter.
        """
        digest = hashlib.sha256(self._header)
        self._file.seek(len(self._header))
        not_finite = None
        for entry in self.entries:
            start = 0
            for raw in self._pieces(entry, multiple):
                digest.update(raw)
                numbers = torch.frombuffer(raw, dtype=entry.dtype).to(dtype or entry.dtype)
                if not_finite is None and not is_finite(numbers):
                    not_finite = entry.name
                place(entry.name, start, numbers)
                start += len(numbers)
        self.sha256 = digest.hexdigest()
        if self._described is not None:
            check_digest(self.path, self.sha256, self._described)
        if not_finite is not None:
            raise AdapterError(f"{self.path}: {not_finite}: holds a number that is NaN or infinite")

    def _pieces(self, entry: Entry, multiple: int) -> Iterator[memoryview]:
        """The bytes of a tensor, whole multiples of `multiple` numbers at a time, in memory that is used again."""
        unit = multiple * entry.dtype.itemsize
        size = max(1, PIECE // unit) * unit
        left = entry.stop - entry.start
        buffer = memoryview(bytearray(min(size, left)))
        while left:
            piece = buffer[: min(size, left)]
            self._fill(piece)
            left -= len(piece)
            yield piece

    def _fill(self, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = self._file.readinto(buffer[done:])
            if not count:
                raise self._broken("it ends too early")
            done += count

    def _read_header(self, size: int) -> bytes:
        """The header with the eight bytes that say how long it is."""
        if size < 8:
            raise self._broken("it has no header")
        length = memoryview(bytearray(8))
        self._fill(length)
        count = int.from_bytes(length, "little")
        if count > min(size - 8, LONGEST_JSON):
            raise self._broken(f"a header of {count} bytes")
        header = memoryview(bytearray(count))
        self._fill(header)
        return bytes(length) + bytes(header)

    def _parse(self, size: int) -> list[Entry]:
        fields = parse_json(self.path, self._header[8:])
        metadata = fields.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._broken("__metadata__ is no object of strings")
        self.metadata: dict[str, str] = metadata
        entries = sorted((self._entry(name, value) for name, value in fields.items()), key=lambda e: (e.start, e.stop))
        end = 0
        for entry in entries:  # neither holes nor overlaps: each byte of the file is a number of one tensor
            if entry.start != end:
                raise self._broken(f"{entry.name} begins at byte {entry.start}, expected {end}")
            end = entry.stop
        if len(self._header) + end != size:
            raise self._broken(f"{size} bytes, expected {len(self._header) + end}")
        return entries

    def _entry(self, name: str, value: Any) -> Entry:
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._broken(f"{name} has not dtype, shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise AdapterError(
                f"{self.path}: {name}: expected one of the dtypes {', '.join(_DTYPES)}, got {shown(dtype)}"
            )
        if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
            raise self._broken(f"{name} has shape {shown(shape)} and data_offsets {shown(offsets)}")
        if math.prod(shape) * _DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
            raise self._broken(f"{name} of shape {shown(shape)} lies in bytes {shown(offsets)}")
        return Entry(name, _DTYPES[dtype], shape, *offsets)

    def _broken(self, why: str) -> AdapterError:
        return AdapterError(f"{self.path}: not a whole safetensors file: {why}")


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of it is NaN or infinite.

    By the least and the greatest number, which are NaN where any is: a tenth of the time of `torch.isfinite`.
    """
    if tensor.dtype not in _DTYPES.values() or not tensor.numel():
        return bool(torch.isfinite(tensor).all())
    return all(math.isfinite(number) for number in tensor.detach().aminmax())


def _are_counts(values: Any) -> bool:
    """Whether it is a list of integers from 0 that a file's size may be."""
    if not isinstance(values, list) or len(values) > 16:
        return False
    return all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in values)
