"""Two calls of PyTorch's flash kernel, over the prefix and over the sequence, merged by log-sum-exp.

The best that can be put together from PyTorch's own parts. Nothing is concatenated; the prefix is expanded over the
batch as a view. The backward rests on this: given the merged output and log-sum-exp, each part's flash backward yields
its own exact gradients (ring attention, arXiv:2310.01889, uses the same).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _MergedFlash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor
    ) -> Tensor:
        pk, pv = (x.expand(query.shape[0], *x.shape) for x in (prefix_key, prefix_value))
        sequence, lse_sequence = flash(query, key, value, is_causal=True)
        prefix, lse_prefix = flash(query, pk, pv)
        # No row is fully masked here: that kernel would call its log-sum-exp 0, which must be -inf before a merge.
        share = torch.sigmoid(lse_prefix - lse_sequence)[..., None]  # of the softmax's mass on the prefix
        out = (sequence - share * (sequence.float() - prefix.float())).to(query.dtype)
        lse = lse_sequence - logsigmoid(lse_sequence - lse_prefix)
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, prefix_key, prefix_value, out, lse = ctx.saved_tensors
        pk, pv = (x.expand(query.shape[0], *x.shape) for x in (prefix_key, prefix_value))
        dq, dk, dv = flash_backward(grad, query, key, value, out, lse, 0.0, True)
        dq_prefix, dpk, dpv = flash_backward(grad, query, pk, pv, out, lse, 0.0, False)
        return dq + dq_prefix, dk, dv, dpk.sum(0), dpv.sum(0)


def merged_flash(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> Tensor:
    """[B, H, T, D] from [B, H, T, D], two [B, Hkv, T, D] and two [Hkv, P, D] with P > 0; causal; CPU only."""
    return _MergedFlash.apply(query, key, value, prefix_key, prefix_value)
