"""Reading and writing one file of an adapter, JSON or safetensors; nothing in a file is trusted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import AdapterError

_LONGEST_JSON = 4 * 2**20
"""Bytes, a thousand times what an adapter needs. Parsing a longer file could fill the memory."""

_DTYPES = ("F64", "F32", "F16", "BF16")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A block in which an AdapterError gets the name of the file in front of its message."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error


def to_json(values: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8, indented and in the order of its keys: equal values make equal bytes."""
    return json.dumps(values, indent=2, sort_keys=True).encode()


def load_json(path: Path) -> dict[str, Any] | None:
    """The object that a JSON file holds; None if there is no such file."""
    if not path.exists():
        return None
    if not path.is_file():  # reading from a device or a pipe might never end
        raise AdapterError(f"{path}: not a file")
    if (size := path.stat().st_size) > _LONGEST_JSON:
        raise AdapterError(f"{path}: expected at most {_LONGEST_JSON} bytes, got {size}")
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def describe(blob: bytes) -> dict[str, Any]:
    """Size and SHA-256 of a file's contents, for `check_file`."""
    return {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}


def check_file(path: Path, described: Mapping[str, Any]) -> None:
    """Raises AdapterError unless the file has the size and SHA-256 that `describe` returned for it."""
    if not path.is_file():
        raise AdapterError(f"{path}: missing")
    size = path.stat().st_size
    if size != described["bytes"]:
        raise AdapterError(f"{path}: {size} bytes in place of {described['bytes']}: truncated or another file")
    if hashlib.sha256(path.read_bytes()).hexdigest() != described["sha256"]:
        raise AdapterError(f"{path}: SHA-256 differs from the manifest's: damaged or another file")


def load_tensors(path: Path, shapes: Mapping[str, list[int]] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own, on the CPU.

    Args:
        path: the file.
        shapes: the names and shapes of the tensors that it must hold, and no others. They are checked against the
            header before any number is read, and the numbers become fp32. None: any tensors, in their own dtypes.

    Raises:
        AdapterError: naming the file, and the tensor whose name, shape, dtype or numbers are wrong.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file, naming(path):
            names = list(file.keys())
            _check_header({name: file.get_slice(name) for name in names}, shapes)
            dtype = None if shapes is None else torch.float32
            tensors = {name: file.get_tensor(name).to(dtype=dtype, copy=True) for name in names}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise AdapterError(f"{path}: not a whole safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {name}: holds a number that is NaN or infinite")
    return tensors


def _check_header(found: Mapping[str, Any], shapes: Mapping[str, list[int]] | None) -> None:
    if shapes is not None:
        for name in sorted(found.keys() ^ shapes.keys()):
            raise AdapterError(f"{name}: {'missing' if name in shapes else 'unknown tensor'}")
    for name, tensor in found.items():
        if tensor.get_dtype() not in _DTYPES:
            raise AdapterError(f"{name}: expected one of the dtypes {', '.join(_DTYPES)}, got {tensor.get_dtype()}")
        if shapes is not None and tensor.get_shape() != shapes[name]:
            raise AdapterError(f"{name}: expected shape {shapes[name]}, got {tensor.get_shape()}")
