"""The triton backend: both ops on NVIDIA GPUs, by Triton kernels; and by PyTorch's fused attention where it is best.

The compiled library declares the ops; registered here are their implementations for CUDA tensors. Triton is imported
when the first of them runs, never by `import prefixcore`.

A launch never waits for the GPU, so that it can be captured in a CUDA graph. Therefore nobody looks at the values of
`prefix_index`, `prefix_lengths` and `cu_seqlens`: the kernels clamp them to what is there. Values out of range,
which raise on the CPU, give a meaningless result here, and never an access outside of a tensor; an id out of range
gives the soft embedding a row of NaN.

Outputs and the prefix's gradients have the same bits on every run. The gradients of query, key and value have them on
the single path; PyTorch's fused attention sums in any order unless `torch.use_deterministic_algorithms(True)`
forbids it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .. import checks, library, nvidia
from ..problem import DIFFERENTIABLE, TENSORS, AttentionProblem
from ..protocol import mismatch
from . import calls, choose, replay
from .choose import PATHS, use_path
from .replay import use_replay

__all__ = [
    "NAME", "PATHS", "describe", "prefix_attention", "prefix_attention_backward", "refuses", "soft_embedding",
    "soft_embedding_backward", "use_path", "use_replay",
]  # fmt: skip

NAME = "triton"
OPS = ("prefix_attention", "soft_embedding")
OLDEST = (8, 0)
"""The compute capability that the kernels need: bfloat16 products and asynchronous copies."""


def _importable(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:
        return False


_TRITON = _importable("triton")


def refuses(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot do `op` on such tensors, or None if it can."""
    if reason := mismatch(op, device_type, dtype, ops=OPS, device="cuda"):
        return reason
    if op == "soft_embedding" and library.CUDA_ARCHITECTURES:
        return "CUDA was compiled in, and its kernels for soft_embedding stand in this one's place"
    if not _TRITON:
        return "Triton is not installed: pip install triton"
    machine = nvidia.machine()
    return machine.problem or nvidia.too_old(machine.newest, OLDEST)


def _check_device(x: Tensor) -> None:
    """RuntimeError if there are several GPUs, and `x` is on one of those that are too old."""
    device = x.device
    if device not in _too_old:
        _too_old[device] = nvidia.too_old(torch.cuda.get_device_capability(device), OLDEST) if x.is_cuda else None
    if reason := _too_old[device]:
        raise RuntimeError(
            f"the triton backend cannot run on {device}: {reason}; move the tensors to a newer one, or run the slow "
            "reference inside 'with prefixcore.use_backend(\"reference\")'"
        )


_too_old: dict[torch.device, str | None] = {}  # what speaks against a device, of those whose tensors came


def describe() -> str:
    """The backend in a few words."""
    return "Triton kernels; for attention's sequence PyTorch's fused attention where it can"


def prefix_attention(*fields: Any) -> tuple[Tensor, Tensor]:
    """`torch.ops.prefixcore.prefix_attention` for CUDA tensors."""
    if replay.applies(fields[0]):
        return replay.run("prefix_attention", _prefix_attention, fields)
    return _prefix_attention(*fields)


def _prefix_attention(*fields: Any) -> tuple[Tensor, Tensor]:
    p = AttentionProblem(*fields)
    checks.check_attention(p)
    p = _readable(p)
    _check_device(p.query)
    with torch.cuda.device_of(p.query):
        from . import paths, single

        if p.query.numel() == 0:
            return single.outputs(p)
        return paths.forward(p, choose.forward(p))


def prefix_attention_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """`torch.ops.prefixcore.prefix_attention_backward` for CUDA tensors; computes what is wanted alone."""
    if replay.applies(arguments[0]):
        return replay.run("prefix_attention_backward", _prefix_attention_backward, arguments)
    return _prefix_attention_backward(*arguments)


def _prefix_attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *fields, needs_query, needs_sequence, needs_prefix = arguments
    p = AttentionProblem(*fields)
    checks.check_attention(p)
    checks.check_outputs(p, grad_out, grad_lse, out, lse)
    p = _readable(p)
    with torch.cuda.device_of(p.query):
        from . import paths, single

        if p.query.numel() == 0:
            return single.no_gradient(p, needs_query, needs_sequence, needs_prefix)
        path = choose.backward(
            p, all_three=needs_query and needs_sequence, grad_lse=grad_lse is not None, needs_prefix=needs_prefix
        )
        return paths.backward(
            p, path, _rows(grad_out), grad_lse, _rows(out), lse.contiguous(), needs_query=needs_query,
            needs_sequence=needs_sequence, needs_prefix=needs_prefix,
        )  # fmt: skip


def soft_embedding(input_ids: Tensor, weight: Tensor, virtual: Tensor) -> Tensor:
    """`torch.ops.prefixcore.soft_embedding` for CUDA tensors, where CUDA was not compiled in."""
    if replay.applies(weight):
        return replay.run("soft_embedding", _soft_embedding, (input_ids, weight, virtual))
    return _soft_embedding(input_ids, weight, virtual)


def _soft_embedding(input_ids: Tensor, weight: Tensor, virtual: Tensor) -> Tensor:
    checks.check_embedding(input_ids, weight, virtual)
    _check_device(weight)
    with torch.cuda.device_of(weight):
        from .kernels.soft_embedding import gather

        return gather(input_ids, _rows(weight), _rows(virtual))


def soft_embedding_backward(grad: Tensor, input_ids: Tensor, vocabulary: int, num_virtual: int) -> Tensor:
    """`torch.ops.prefixcore.soft_embedding_backward` for CUDA tensors, where CUDA was not compiled in."""
    arguments = (grad, input_ids, vocabulary, num_virtual)
    if replay.applies(grad):
        return replay.run("soft_embedding_backward", _soft_embedding_backward, arguments)
    return _soft_embedding_backward(*arguments)


def _soft_embedding_backward(grad: Tensor, input_ids: Tensor, vocabulary: int, num_virtual: int) -> Tensor:
    checks.check_embedding_backward(grad, input_ids, vocabulary, num_virtual)
    with torch.cuda.device_of(grad):
        from .kernels.soft_embedding import grad_virtual

        return grad_virtual(grad, input_ids, vocabulary, num_virtual)


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
    implementations.impl("call_of_plan", calls.run, dispatch_key)
    if not (dispatch_key == "CUDA" and library.CUDA_ARCHITECTURES):  # the dispatcher keeps one kernel for each key
        implementations.impl("soft_embedding", soft_embedding, dispatch_key)
        implementations.impl("soft_embedding_backward", soft_embedding_backward, dispatch_key)
    return implementations


if library.BUILT:
    _REGISTERED = register()
