"""Files of others: read so that nothing in them runs or fills the memory (`.pt`, `.npy`, raw bytes); written whole."""

from __future__ import annotations

import hashlib
import io
import math
import os
import pickle
import re
import secrets
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..._text import printable
from ..errors import AdapterError, shown
from ..storage import check_path, naming, open_file
from .record import MOST_NUMBERS


def read_bytes(path: Path, limit: int = 4 * MOST_NUMBERS) -> bytes:
    """The bytes of a regular file.

    Raises:
        AdapterError: no such file, no regular file, or one beyond `limit` bytes.
    """
    try:
        file = open_file(path)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror or error}") from error
    if file is None:
        raise AdapterError(f"{path}: no such file")
    with file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise AdapterError(f"{path}: {size:,} bytes, expected at most {limit:,}")
        data = file.readall()
    return data or b""


def load_torch(path: Path, names: dict[str, Any] | None = None) -> Any:
    """What `torch.save` wrote, by `weights_only`: tensors in dictionaries and lists, and nothing that runs.

    Args:
        path: the file.
        names: what stands for other classes that the file may name, by their full names.

    Raises:
        AdapterError: it is not such a file, or needs more than that.
    """
    data = read_bytes(path)
    _check_archive(path, data)
    classes: list[Any] = [(stand_in, name) for name, stand_in in (names or {}).items()]
    try:
        with torch.serialization.safe_globals(classes):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise AdapterError(
            f"{path}: needs unpickling, which runs code that the file names, and is refused: {_reason(error)}; ask "
            "whoever made it to save tensors alone (a state_dict), or safetensors"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file, torch raises whatever its arithmetic comes to
        raise AdapterError(f"{path}: not a whole file of torch.save: {_reason(error)}") from error


def load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; AdapterError: there is none, or it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = read_bytes(path)
    try:
        return load(data)
    except SafetensorError as error:
        raise AdapterError(f"{path}: not a whole safetensors file: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What an error says, in a line; of weights_only the class that the file names, without its advice to trust it."""
    text = str(error).strip()
    named = re.search(r"GLOBAL (\S+)", text)
    if named:
        return f"it names {printable(named[1][:80])}"
    return printable((text.splitlines() or [type(error).__name__])[0][:200])


def _check_archive(path: Path, data: bytes) -> None:
    """Raises AdapterError unless it is the archive that `torch.save` writes: nothing in it is compressed."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
    except Exception as error:  # of a damaged archive, zipfile raises more than BadZipFile
        raise AdapterError(
            f"{path}: not a file of torch.save (of torch 1.6 or later), or one that is cut off: {_reason(error)}"
        ) from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise AdapterError(f"{path}: {shown(entry.filename)} in it is compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > len(data):
        raise AdapterError(f"{path}: claims more bytes than the file has")


def load_npy(path: Path) -> torch.Tensor:
    """The numbers of an `.npy` file; AdapterError: none, of another kind of numbers, or shorter than it claims."""
    import numpy as np

    data = read_bytes(path)
    stream = io.BytesIO(data)
    with naming(path):
        try:
            version = np.lib.format.read_magic(stream)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = read[version](stream)
        except Exception as error:  # of a damaged header, numpy raises what Python's own parser does
            raise AdapterError(f"not a .npy file: {_reason(error)}") from error
        if dtype.hasobject:
            raise AdapterError("holds Python objects, which need unpickling, and is refused")
        if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
            raise AdapterError(f"expected numbers of float16, float32 or float64, got {dtype}")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
            raise AdapterError(
                f"shape {shown(shape)} does not fit the {len(data) - stream.tell()} bytes behind its header"
            )
        array = np.load(io.BytesIO(data), allow_pickle=False)
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def save_torch(value: Any) -> bytes:
    """The bytes of `torch.save`."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def save_npy(tensor: torch.Tensor) -> bytes:
    """The bytes of an `.npy` file."""
    import numpy as np

    if tensor.dtype == torch.bfloat16:
        raise AdapterError("a .npy file has no bfloat16; write float32 or float16")
    stream = io.BytesIO()
    np.save(stream, tensor.numpy(), allow_pickle=False)
    return stream.getvalue()


def digest_of(source: Path) -> str:
    """The SHA-256 of a file, or of a folder's files by their names."""
    try:
        paths = [source] if not source.is_dir() else sorted(path for path in source.iterdir() if path.is_file())
    except OSError as error:
        raise AdapterError(f"{source}: cannot be read: {error.strerror or error}") from error
    if source.is_dir():
        lines = [f"{path.name} {hashlib.sha256(read_bytes(path)).hexdigest()}\n" for path in paths]
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
    return hashlib.sha256(read_bytes(source)).hexdigest()


def check_free(target: Path) -> None:
    """Raises AdapterError if something is there: files of others are never replaced."""
    check_path(target)
    if os.path.lexists(target):
        raise AdapterError(f"{target}: is there already; give another name, or remove it")


def put(target: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder of files, or the one whose name is empty, beside its place, and gives it its name as a whole."""
    new = target.absolute().parent / f".{target.name}.writing-{secrets.token_hex(4)}"
    new.parent.mkdir(parents=True, exist_ok=True)
    try:
        if set(files) == {""}:
            new.write_bytes(files[""])
        else:
            new.mkdir()
            for name, data in files.items():
                (new / name).write_bytes(data)
        check_free(target)
        os.rename(new, target)
    finally:
        if new.is_dir():
            shutil.rmtree(new, ignore_errors=True)
        else:
            new.unlink(missing_ok=True)
