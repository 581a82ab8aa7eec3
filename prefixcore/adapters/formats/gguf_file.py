"""One tensor in a GGUF file, by the `gguf` package."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterError, shown
from .files import read_bytes

_MAGIC = b"GGUF"


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise AdapterError("GGUF files need the package gguf: pip install 'prefixcore[formats]'") from error
    return gguf


def write_tensor(name: str, numbers: torch.Tensor) -> bytes:
    """The bytes of a GGUF file that holds `numbers` under `name`."""
    gguf = _gguf()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensor.gguf"
        writer = gguf.GGUFWriter(path, "prefixcore")
        writer.add_uint32("prefixcore.num_virtual_tokens", numbers.shape[0])
        writer.add_tensor(name, numbers.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """The numbers of a tensor; AdapterError: no GGUF file, no such tensor, or one of another form than float."""
    gguf = _gguf()
    if read_bytes(path)[:4] != _MAGIC:
        raise AdapterError("not a GGUF file")
    try:
        reader = gguf.GGUFReader(path)
        found = {tensor.name: tensor for tensor in reader.tensors}
        tensor = found.get(name)
        numbers = None if tensor is None else torch.from_numpy(tensor.data.copy())
    except Exception as error:  # of a file that is cut off, the package raises whatever its arithmetic comes to
        raise AdapterError(f"not a whole GGUF file ({type(error).__name__})") from error
    if tensor is None or numbers is None:
        raise AdapterError(f"{name}: missing; it holds {shown(sorted(found))}")
    if tensor.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        raise AdapterError(f"{name}: expected F32 or F16, got {tensor.tensor_type.name}")
    return numbers
