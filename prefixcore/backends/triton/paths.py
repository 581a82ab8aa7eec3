"""Runs the path that was chosen. To import this module is to import Triton."""

from __future__ import annotations

from torch import Tensor

from ..problem import AttentionProblem
from . import beside, folded, merged, single
from .choose import Path
from .kernels.delta import compute_delta


def forward(p: AttentionProblem, path: Path) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    if path.name == "fa4":
        return beside.forward(p)
    if path.prefix is not None:
        return folded.forward(p, path.prefix, path.fused)
    if path.fused is not None:
        return merged.forward(p, path.fused)
    if path.name == "decode_once":
        return single.decode_once(p)
    return single.decode(p) if path.name == "decode" else single.forward(p)


def backward(
    p: AttentionProblem, path: Path, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *,
    needs_query: bool, needs_sequence: bool, needs_prefix: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """All five gradients, empty tensors for those that are not needed."""
    if path.name == "fa4":
        return beside.backward(p, grad_out, out, lse, needs_prefix=needs_prefix)
    if path.prefix is not None:
        return folded.backward(
            p, path.prefix, path.fused, grad_out, out, lse, needs_query=needs_query, needs_sequence=needs_sequence,
            needs_prefix=needs_prefix,
        )  # fmt: skip
    if path.fused is not None:
        return merged.backward(p, path.fused, grad_out, out, lse, needs_prefix=needs_prefix)
    if path.name == "short":
        return single.grad_once(
            p, grad_out, grad_lse, out, lse, needs_query=needs_query, needs_sequence=needs_sequence,
            needs_prefix=needs_prefix,
        )  # fmt: skip
    grads = single.unwanted(p)
    delta = compute_delta(grad_out, out, grad_lse)
    if needs_query:
        grads[0] = single.grad_query(p, grad_out, lse, delta)
    if needs_sequence:
        grads[1:3] = single.grad_sequence(p, grad_out, lse, delta)
    if needs_prefix:
        grads[3:] = single.grad_prefix(p, grad_out, lse, delta)
    return tuple(grads)
