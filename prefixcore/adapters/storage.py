"""Opening one file of an adapter and reading its JSON; nothing in a file is trusted."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import AdapterError, shown

LONGEST_JSON = 4 * 2**20
"""Bytes, a thousand times what an adapter needs. Parsing a longer file could fill the memory."""

PIECE = 2**20
"""Bytes that are read at a time."""

_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A block in which an AdapterError gets the name of the file in front of its message."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error


@contextmanager
def naming_errors_of(path: Path) -> Iterator[None]:
    """A block in which an error of the file system that names no file, such as that it is full, gets this name."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_path(path: Path) -> None:
    """Raises AdapterError for a path that no file system takes, as Python's own error does not say which it is."""
    if "\0" in str(path):
        raise AdapterError(f"{shown(str(path))}: a path cannot hold a NUL character; take it out")


def open_file(path: Path) -> io.FileIO | None:
    """A regular file, or a link to one, opened for reading; None if there is nothing of this name.

    Whatever else has the name is an error and not opened: reading from a device or a pipe might never end, and an
    entry that is there but can't be read is not the same as none.

    Raises:
        AdapterError: not a regular file, or a link that leads nowhere.
        OSError: the file system refuses, for example because of permissions or of links that lead in a circle.
    """
    check_path(path)
    try:
        found = path.stat()
    except FileNotFoundError:
        if os.path.lexists(path):
            raise AdapterError(f"{path}: a link to nothing") from None
        return None
    _check_regular(path, found)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    file = io.FileIO(os.open(path, flags))
    try:
        _check_regular(path, os.fstat(file.fileno()))  # it may have become another in between
    except BaseException:
        file.close()
        raise
    return file


def _check_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise AdapterError(f"{path}: not a file but a {_KINDS.get(stat.S_IFMT(found.st_mode), 'special file')}")


def write_new(path: Path, data: bytes) -> None:
    """Writes a file that must not be there yet, and waits until it is on the disk."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def to_json(values: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8, indented and in the order of its keys: equal values make equal bytes."""
    return json.dumps(values, indent=2, sort_keys=True).encode()


def load_json(path: Path) -> dict[str, Any] | None:
    """The object that a JSON file holds; None if there is no such file.

    Raises:
        AdapterError: not a regular file, too long, or no JSON object.
        OSError: the file system refuses.
    """
    data = load_bytes(path, LONGEST_JSON)
    return None if data is None else parse_json(path, data)


def load_bytes(path: Path, limit: int) -> bytes | None:
    """What a file holds; None if there is no such file.

    Raises:
        AdapterError: not a regular file, or one of more than `limit` bytes.
        OSError: the file system refuses.
    """
    file = open_file(path)
    if file is None:
        return None
    with file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise AdapterError(f"{path}: expected at most {limit} bytes, got {size}")
        return _read_at_most(file, limit)


def check_bytes(path: Path, data: bytes, described: Mapping[str, Any]) -> None:
    """Raises AdapterError unless a file's contents are those that `describe` was called with."""
    check_size(path, len(data), described)
    check_digest(path, hashlib.sha256(data).hexdigest(), described)


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """The object that JSON text from this file is; AdapterError: it is none."""
    try:
        values = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which each field stands once: of two, other readers may take the other one."""
    values = dict(pairs)
    if len(values) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the field {ascii(name)[:100]} stands there twice")
    return values


def _read_at_most(file: io.FileIO, limit: int) -> bytes:
    """What is left of a file, up to `limit` bytes, also if it grows while it is read."""
    pieces, left = [], limit
    while left and (piece := file.read(min(left, PIECE))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def describe(blob: bytes) -> dict[str, Any]:
    """Size and SHA-256 of a file's contents, for `check_size` and `check_digest`."""
    return {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}


def check_size(path: Path, size: int, described: Mapping[str, Any]) -> None:
    """Raises AdapterError unless the file has the size that `describe` returned for it."""
    if size != described["bytes"]:
        hint = (
            "; if PEFT has saved over it, remove prefixcore_manifest.json, which describes the former one"
            if path.name in ("adapter_config.json", "adapter_model.safetensors")
            else ""
        )
        raise AdapterError(f"{path}: {size} bytes in place of {described['bytes']}: truncated or another file{hint}")


def check_digest(path: Path, digest: str, described: Mapping[str, Any]) -> None:
    """Raises AdapterError unless the file has the SHA-256 that `describe` returned for it."""
    if digest != described["sha256"]:
        raise AdapterError(f"{path}: SHA-256 differs from the manifest's: damaged or another file")
