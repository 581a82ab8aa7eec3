"""The folded path: a vendor's fused attention does the prefix too, with the batch folded into its rows.

A prefix is seen by every query and shared by all batch rows, so attention over it does not care which row a query
belongs to: `[1, H, B * T, D]` is a view of `[B, T, H, D]` memory, and one call that is not causal, over a prefix
`[1, Hkv, P, D]`, does all rows at the vendor's rate with nothing expanded. The sequence's part is done as ever, by a
fused attention where one can, else by our own kernels (padding, masks, packed rows, windows); a kernel merges the two.
Backward, either part is given the merged output and log-sum-exp. The vendor's gradients of its keys and values are then
the prefix's, summed over batch and head group; they come in the dtype of the query, rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import AttentionProblem
from . import single
from .fused_attention import FusedAttention, without_prefix
from .kernels.delta import compute_delta
from .kernels.merge import launch_add, launch_merge
from .vendors import prefix_part


def fold(x: Tensor) -> Tensor:
    """`x` [B, H, T, D] as [1, H, B * T, D]: a view where the memory is [B, T, H, D], else a copy."""
    batch, heads, length, dim = x.shape
    return x.transpose(1, 2).reshape(1, batch * length, heads, dim).transpose(1, 2)


def unfold(x: Tensor, batch: int) -> Tensor:
    """`x` [1, H, B * T, ...] as [B, H, T, ...]: always a view."""
    return x.unflatten(2, (batch, -1))[0].transpose(0, 1)


def _prefix_part(p: AttentionProblem) -> AttentionProblem:
    """The queries of all rows over the prefix of `p`, in the dtype of the queries as our own kernels read it."""
    prefix_key, prefix_value = (x[:1].to(p.query.dtype) for x in p.bank)
    return prefix_part(p, fold(p.query), prefix_key, prefix_value)


def forward(p: AttentionProblem, prefix: FusedAttention, fused: FusedAttention | None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of both parts: `prefix` does the prefix, `fused` (None: our kernels) the sequence."""
    sequence = without_prefix(p)
    out, lse = single.forward(sequence) if fused is None else fused.forward(sequence)
    part, part_lse = prefix.forward(_prefix_part(p))
    sinks = None if fused is None else p.sinks  # our kernels have taken them in
    launch_merge(out, lse, unfold(part, p.batch), unfold(part_lse, p.batch), sinks)
    return out, lse


def backward(
    p: AttentionProblem, prefix: FusedAttention, fused: FusedAttention | None, grad_out: Tensor, out: Tensor,
    lse: Tensor, *, needs_query: bool, needs_sequence: bool, needs_prefix: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """All five gradients, empty tensors for those that are not needed."""
    grads = single.unwanted(p)
    sequence = without_prefix(p)
    if fused is not None and needs_query and needs_sequence:
        grads[:3] = fused.backward(sequence, grad_out, out, lse)
    elif needs_query or needs_sequence:
        delta = compute_delta(grad_out, out, None)
        if needs_query:
            grads[0] = single.grad_query(sequence, grad_out, lse, delta)
        if needs_sequence:
            grads[1:3] = single.grad_sequence(sequence, grad_out, lse, delta)
    if needs_query or needs_prefix:
        part = _prefix_part(p)
        folded_lse = lse.transpose(0, 1).reshape(1, p.heads, -1)
        grad_query, *of_prefix = prefix.backward(part, fold(grad_out), fold(out), folded_lse)
        if needs_query:
            launch_add(grads[0], unfold(grad_query, p.batch))
        if needs_prefix:
            grads[3:] = (_as_prefix(grad, x) for grad, x in zip(of_prefix, (p.prefix_key, p.prefix_value), strict=True))
    return tuple(grads)


def _as_prefix(grad: Tensor, prefix: Tensor) -> Tensor:
    """The gradient of a prefix in its own shape, float32: zeros for entries of a bank that nobody names."""
    if prefix.numel() == grad.numel():
        return grad.float().reshape(prefix.shape)
    whole = prefix.new_zeros(prefix.shape, dtype=torch.float32)
    whole[:1].copy_(grad)
    return whole
