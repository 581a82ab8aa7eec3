"""The cpu backend: C++ kernels for both ops, compiled once an instruction set and chosen at run time."""

from __future__ import annotations

import torch

from . import library
from .protocol import DTYPES, mismatch

NAME = "cpu"
OPS = ("prefix_attention", "soft_embedding")


def refuses(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot do `op` on such tensors, or None if it can."""
    if device_type == "cpu" and dtype in DTYPES and op in OPS:  # said at once, for every small call asks
        return None
    return mismatch(op, device_type, dtype, ops=OPS, device="cpu")


def describe() -> str:
    """The backend in a few words."""
    return f"C++ kernels, {library.host().isa()}"
