"""The compiled library: loading it, and telling PyTorch what the C++ cannot.

The ops are registered by the library itself, through torch's stable ABI. Registered here are their shapes under
fake tensors (`torch.compile`), their derivatives (`gradients.py`) and what they cost (`flops.py`). The backends stand
on this module.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import flops, gradients
from .layout import empty_gradient, empty_heads_last
from .problem import AttentionProblem

LIBRARY = Path(__file__).resolve().parent.parent / "_kernels.so"
BUILT = False
"""Whether the compiled library is there and was loaded."""

WHY = f"are missing ({LIBRARY.name})"
"""Where it is not: why, in words."""


def require() -> None:
    """Raises RuntimeError, with the remedy, unless the compiled library is there."""
    if not BUILT:
        raise RuntimeError(
            f"prefixcore's compiled kernels {WHY}: build them with 'pip install --no-build-isolation -e .' in the "
            "repository, or run the slow reference with PREFIXCORE_BACKEND=reference"
        )


def host() -> ModuleType:
    """The pybind11 module of host facts: `isa()`, `select_isa(name)`, `build_info()`, ..."""
    require()
    from .. import _host

    return _host


# --- prefix attention -----------------------------------------------------------------------------


def _prefix_attention_fake(*fields: Any) -> tuple[Tensor, Tensor]:
    p = AttentionProblem(*fields)
    return empty_heads_last(p.query, p.value_dim), p.query.new_empty(p.query.shape[:3], dtype=torch.float32)


def _prefix_attention_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *fields, needs_query, needs_sequence, needs_prefix = arguments
    p = AttentionProblem(*fields)
    none = p.query.new_empty(0)
    none32 = p.query.new_empty(0, dtype=torch.float32)
    return (
        empty_gradient(p.query) if needs_query else none,
        empty_gradient(p.key) if needs_sequence else none.clone(),
        empty_gradient(p.value) if needs_sequence else none.clone(),
        p.prefix_key.new_empty(p.prefix_key.shape, dtype=torch.float32) if needs_prefix else none32,
        p.prefix_value.new_empty(p.prefix_value.shape, dtype=torch.float32) if needs_prefix else none32.clone(),
    )


# --- soft embedding -------------------------------------------------------------------------------


def _soft_embedding_fake(input_ids: Tensor, weight: Tensor, virtual: Tensor) -> Tensor:
    return weight.new_empty(*input_ids.shape, weight.shape[1])


def _soft_embedding_backward_fake(grad: Tensor, input_ids: Tensor, vocabulary: int, num_virtual: int) -> Tensor:
    return grad.new_empty(num_virtual, grad.shape[-1], dtype=torch.float32)


# --- registration ---------------------------------------------------------------------------------


def _register() -> torch.library.Library:
    torch.ops.load_library(LIBRARY)
    derivatives = torch.library.Library("prefixcore", "IMPL")
    fakes: dict[str, Callable[..., Any]] = {
        "prefix_attention": _prefix_attention_fake,
        "prefix_attention_backward": _prefix_attention_backward_fake,
        "soft_embedding": _soft_embedding_fake,
        "soft_embedding_backward": _soft_embedding_backward_fake,
    }
    for op, fake in fakes.items():
        torch.library.register_fake(f"prefixcore::{op}", fake)
        derivatives.impl(op, gradients.AUTOGRAD[op], "Autograd")
    flops.register()
    return derivatives


def _check_whole(file: Path) -> None:
    """Raises OSError if an ELF file ends before its last part does: to read what is not there ends the process."""
    with file.open("rb") as library:
        header = library.read(64)
    if len(header) < 64 or header[:6] != b"\x7fELF\2\1":  # of 64 bits, little-endian; else the loader says what it is
        return
    # The last part is the table of sections.
    start, entry_size, count = struct.unpack_from("<40xQ10xHH", header)
    whole, found = start + entry_size * count, file.stat().st_size
    if found < whole:
        raise OSError(f"{file.name} is cut short: {found:,} of {whole:,} bytes are there; install prefixcore again")


def _cuda_architectures() -> tuple[tuple[int, int], ...]:
    with suppress(ImportError):  # of the host module: whoever needs it says so
        names = host().build_info()["cuda_architectures"]
        return tuple((int(number[:-1]), int(number[-1])) for number in re.findall(r"\d+", names))
    return ()


CUDA_ARCHITECTURES: tuple[tuple[int, int], ...] = ()
"""The compute capabilities that the CUDA sources were compiled for; none where they were not."""

if LIBRARY.exists():
    try:
        for file in (LIBRARY, *LIBRARY.parent.glob("_host.*.so")):
            _check_whole(file)
        _REGISTERED = _register()  # lasts as long as this object does
        BUILT = True
    except OSError as error:  # built for another machine, or damaged: what needs none of it goes on, and doctor says so
        WHY = f"cannot be loaded ({error.__cause__ or error})"
if BUILT:
    CUDA_ARCHITECTURES = _cuda_architectures()
