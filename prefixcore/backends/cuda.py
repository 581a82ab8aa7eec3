"""The CUDA backend: C++ kernels for the soft embedding, and three inference ops that other backends build on.

``torch.ops.prefixcore`` has these beside the ops of every device, where CUDA was compiled in:

* ``split_reduction(partials, scale)``: ``scale * partials.sum(0)`` in float32, in the order of the first dimension;
* ``lse_merge(out, lse, other_out, other_lse)``: merges attention over some keys ``[B, H, T, Dv]``, in place, with
  attention of the same queries over others, each with its log-sum-exp ``[B, H, T]``;
* ``bank_decode(query, prefix_key, prefix_value, prefix_index, prefix_lengths, scale)``: attention of a few queries a
  row over the prefix that the row names, ``(out, lse)`` in float32, ready for ``lse_merge``.

The kernels compile for sm_80, sm_90 and sm_100 without a spill, and an H200 has run their tests. They have to be asked
for with ``use_backend("cuda")`` or ``PREFIXCORE_BACKEND=cuda``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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


# --- the ops that only this backend has, under fake tensors ---------------------------------------


def _split_reduction_fake(partials: Tensor, scale: float) -> Tensor:
    return partials.new_empty(partials.shape[1:])


def _lse_merge_fake(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    return None


def _bank_decode_fake(
    query: Tensor, prefix_key: Tensor, prefix_value: Tensor,
    prefix_index: Tensor | None, prefix_lengths: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, queries, _dim = query.shape
    out = query.new_empty(batch, heads, queries, prefix_value.shape[-1], dtype=torch.float32)
    return out, query.new_empty(batch, heads, queries, dtype=torch.float32)


FAKES: dict[str, Callable[..., Any]] = {
    "split_reduction": _split_reduction_fake,
    "lse_merge": _lse_merge_fake,
    "bank_decode": _bank_decode_fake,
}


def register_fakes(namespace: str) -> None:
    for op, fake in FAKES.items():
        torch.library.register_fake(f"{namespace}::{op}", fake)


if library.BUILT and hasattr(torch.ops.prefixcore, "bank_decode"):
    register_fakes("prefixcore")
