"""What every backend is: the one form of its module, and what such modules share.

A backend is one module (or package) here with the members of `Backend`, which registers its kernels with PyTorch's
dispatcher when it is imported, and a place in the table of `prefixcore/ops/select.py`, where mypy holds it to the
protocol. CONTRIBUTING.md ("How to add a backend") has all steps.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Backend(Protocol):
    """One implementation of one or several ops for one type of device; a module satisfies it."""

    @property
    def NAME(self) -> str:
        """What users call it: in `use_backend`, `PREFIXCORE_BACKEND` and what `which_backend` says."""

    def refuses(self, op: str, device_type: str, dtype: torch.dtype, /) -> str | None:
        """Why it cannot do `op` on such tensors, in words that follow "the ... backend refuses:"; None if it can.

        Asked at every call, also while it is compiled: quick, and without a look at any tensor.
        """

    def describe(self) -> str:
        """It in a few words: what `which_backend` gives as the reason where it is the default."""


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that all backends have kernels for."""

_PLACES = {"cpu": "the CPU", "cuda": "NVIDIA GPUs"}


def mismatch(
    op: str, device_type: str, dtype: torch.dtype, *, ops: tuple[str, ...], device: str
) -> str | None:  # fmt: skip
    """Why a backend that has `ops` for tensors on `device`, in `DTYPES`, cannot do this one; None if it can."""
    if op not in ops:
        return f"it has no kernel for {op}"
    if device_type != device:
        return f"it runs on {_PLACES[device]}, not on {device_type}"
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None
