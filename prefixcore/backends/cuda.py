"""The CUDA backend: so far the soft embedding alone.

Its kernels compile for sm_80, sm_90 and sm_100 without a spill, but no GPU has run them yet: they have to be asked
for with ``use_backend("cuda")`` or ``PREFIXCORE_BACKEND=cuda``.
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
