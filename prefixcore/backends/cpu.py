"""The CPU backend: C++ kernels, compiled once an instruction set and chosen at run time."""

from __future__ import annotations

import torch

from . import library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot do ``op`` on such tensors, or None if it can."""
    if device_type != "cpu":
        return f"it runs on the CPU, not on {device_type}"
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


def describe() -> str:
    """The backend in a few words."""
    return f"C++ kernels, {library.host().isa()}"
