"""The cuda backend: C++ kernels for the soft embedding on NVIDIA GPUs, where CUDA was compiled in.

They never wait for the GPU: an id out of range, which raises on the CPU, gives a row of NaN here, and never an access
outside of a table. The kernels compile for sm_80, sm_90 and sm_100 without a spill.
"""

from __future__ import annotations

import torch

from . import library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot do ``op`` on such tensors, or None if it can."""
    if op != "soft_embedding":
        return f"it has no kernel for {op} yet"
    if device_type != "cuda":
        return f"it runs on CUDA devices, not on {device_type}"
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if not library.host().build_info()["cuda_architectures"]:
        return "CUDA was not compiled in: build with PREFIXCORE_CUDA=1 where nvcc is installed"
    return None


def describe() -> str:
    """The backend in a few words."""
    return f"CUDA kernels for sm_{library.host().build_info()['cuda_architectures'].replace(',', ', sm_')}"
