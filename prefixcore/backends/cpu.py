"""The cpu backend: C++ kernels for both ops, compiled once an instruction set and chosen at run time."""

from __future__ import annotations

import os

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
    """The backend in a few words; ValueError: as of `instruction_set`."""
    return f"C++ kernels, {instruction_set()}"


def instruction_set() -> str:
    """The one in use; ValueError, as of every op: PREFIXCORE_ISA names one that cannot run here."""
    host = library.host()
    name: str = host.isa()
    if name == "none":
        host.select_isa(os.environ.get("PREFIXCORE_ISA", ""))
    return name
