"""The GPU backend: PyTorch's fused attention where it is best, Triton kernels for the prefix and for everything else.

The compiled library declares the ops; registered here are their implementations for CUDA tensors. Triton is imported
when the first of them runs, never by ``import prefixcore``.

A launch never waits for the GPU, so that it can be captured in a CUDA graph. Therefore nobody looks at the values of
``prefix_index``, ``prefix_lengths`` and ``cu_seqlens``: the kernels clamp them to what is there. Values out of range,
which raise on the CPU, give a meaningless result here, and never an access outside of a tensor.

Outputs and the prefix's gradients have the same bits on every run. The gradients of query, key and value have them on
the single path; PyTorch's fused attention sums in any order unless ``torch.use_deterministic_algorithms(True)``
forbids it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .. import library
from ..problem import DIFFERENTIABLE, TENSORS, AttentionProblem
from . import choose
from .choose import PATHS, use_path

__all__ = ["DTYPES", "PATHS", "describe", "prefix_attention", "prefix_attention_backward", "refuses", "use_path"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)
"""The compute capability that the kernels need: bfloat16 products and asynchronous copies."""

_machines: dict[str, str | None] = {}  # what speaks against each GPU, by its index, and against all of them


def _importable(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:
        return False


_TRITON = _importable("triton")


def refuses(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot do ``op`` on such tensors, or None if it can."""
    if op != "prefix_attention":
        return f"it has no kernel for {op}"
    if device_type != "cuda":
        return f"it runs on NVIDIA GPUs, not on {device_type}"
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if not _TRITON:
        return "Triton is not installed: pip install triton"
    if "all" not in _machines:
        _machines["all"] = _look_at_the_machine()
    return _machines["all"]


def _look_at_the_machine() -> str | None:
    if torch.version.hip is not None:
        return "it has been written for NVIDIA's GPUs, and this PyTorch is for AMD's"
    if not torch.cuda.is_available():
        return "no GPU is there"
    best = max(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    return _too_old(best)


_look_at_the_machine._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile is not to trace it


def _too_old(capability: tuple[int, int]) -> str | None:
    if capability >= OLDEST:
        return None
    return "it needs compute capability {}.{}, and the GPU has {}.{}".format(*OLDEST, *capability)


def _check_device(x: Tensor) -> None:
    """RuntimeError if there are several GPUs, and `x` is on one of those that are too old."""
    index = str(x.device.index)
    if index not in _machines:
        _machines[index] = _too_old(torch.cuda.get_device_capability(x.device)) if x.is_cuda else None
    if reason := _machines[index]:
        raise RuntimeError(
            f"the triton backend cannot run on {x.device}: {reason}; move the tensors to a newer one, or run the slow "
            "reference inside 'with prefixcore.use_backend(\"reference\")'"
        )


def describe() -> str:
    """The backend in a few words."""
    return "Triton kernels, PyTorch's fused attention for the sequence where it can"


def prefix_attention(*fields: Any) -> tuple[Tensor, Tensor]:
    """``torch.ops.prefixcore.prefix_attention`` for CUDA tensors."""
    p = _readable(AttentionProblem(*fields))
    _check_device(p.query)
    with torch.cuda.device_of(p.query):
        from . import merged, single

        if p.query.numel() == 0:
            return single.outputs(p)
        path = choose.forward(p)
        if path.fused is not None:
            return merged.forward(p, path.fused)
        return single.decode(p) if path.name == "decode" else single.forward(p)


def prefix_attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """``torch.ops.prefixcore.prefix_attention_backward`` for CUDA tensors; computes what is wanted alone."""
    *fields, needs_query, needs_sequence, needs_prefix = arguments
    p = _readable(AttentionProblem(*fields))
    with torch.cuda.device_of(p.query):
        from . import merged, single
        from .kernels.delta import compute_delta

        if p.query.numel() == 0:
            return single.no_gradient(p, needs_query, needs_sequence, needs_prefix)
        grad_out, out, lse = _rows(grad_out), _rows(out), lse.contiguous()
        path = choose.backward(p, all_three=needs_query and needs_sequence, grad_lse=grad_lse is not None)
        if path.fused is not None:
            return merged.backward(p, path.fused, grad_out, out, lse, needs_prefix=needs_prefix)
        grads = single.unwanted(p)
        delta = compute_delta(grad_out, out, grad_lse)
        if needs_query:
            grads[0] = single.grad_query(p, grad_out, lse, delta)
        if needs_sequence:
            grads[1:3] = single.grad_sequence(p, grad_out, lse, delta)
        if needs_prefix:
            grads[3:] = single.grad_prefix(p, grad_out, lse, delta)
    return tuple(grads)


def _readable(p: AttentionProblem) -> AttentionProblem:
    """`p` as kernels read it: contiguous rows, and vectors without strides. Masks are read by all of their strides."""
    changed: dict[str, Any] = {
        name: x.contiguous()
        for name, x in zip(TENSORS, p.tensors, strict=True)
        if x is not None and (name in DIFFERENTIABLE or x.dim() == 1) and not _has_rows(x)
    }
    return p._replace(**changed) if changed else p


def _rows(x: Tensor) -> Tensor:
    """`x` with its last dimension contiguous. Only what is not is copied."""
    return x if _has_rows(x) else x.contiguous()


def _has_rows(x: Tensor) -> bool:
    return x.shape[-1] <= 1 or x.stride(-1) == 1


def register(dispatch_key: str = "CUDA") -> torch.library.Library:
    """Has the dispatcher call this backend for tensors of `dispatch_key`, as long as what is returned lives."""
    implementations = torch.library.Library("prefixcore", "IMPL")
    implementations.impl("prefix_attention", prefix_attention, dispatch_key)
    implementations.impl("prefix_attention_backward", prefix_attention_backward, dispatch_key)
    return implementations


if library.BUILT:
    _REGISTERED = register()
