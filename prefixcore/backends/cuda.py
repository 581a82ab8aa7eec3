"""The cuda backend: the soft embedding on NVIDIA GPUs in C++, where CUDA was compiled in. The default there.

It never waits for the GPU, so that it can be captured in a CUDA graph: an id out of range, which raises on the CPU,
gives a row of NaN, and never an access outside of a table.
"""

from __future__ import annotations

import torch

from . import library, nvidia
from .protocol import mismatch

NAME = "cuda"
OPS = ("soft_embedding",)


def refuses(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot do `op` on such tensors, or None if it can."""
    if reason := mismatch(op, device_type, dtype, ops=OPS, device="cuda"):
        return reason
    if not library.CUDA_ARCHITECTURES:
        return "CUDA was not compiled in: build with PREFIXCORE_CUDA=1 where nvcc is installed"
    machine = nvidia.machine()
    return None if machine.problem else nvidia.too_old(machine.newest, min(library.CUDA_ARCHITECTURES))


def describe() -> str:
    """The backend in a few words."""
    return "CUDA kernels for " + ", ".join(f"sm_{major}{minor}" for major, minor in library.CUDA_ARCHITECTURES)
