"""Whose fused attention can do a part of a problem, the sequence's or the prefix's, and in words why nobody's can."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import AttentionProblem
from . import flash4, fused_attention
from .fused_attention import FusedAttention, without_prefix
from .thresholds import FOLDED_VENDORS, REPEATABLE


def for_the_sequence(p: AttentionProblem, *, training: bool) -> tuple[FusedAttention | None, str]:
    """Whose kernel can do the sequence's part, and that in words; or None and why nobody's.

    PyTorch's own where they can, FlashAttention-4 where not: windows, softcap, packed rows, chunks after a cache.
    """
    reason = fused_attention.cannot(p)
    kernel = None if reason else fused_attention.preferred(p, training=training)
    if kernel is None and flash4.cannot(p) is None:
        kernel = flash4.FLASH4
    if kernel is not None:
        return kernel, f"{kernel.name} does the sequence"
    return None, reason or _no_kernel_for(p.query.dtype)


def for_the_prefix(p: AttentionProblem, *, training: bool) -> tuple[FusedAttention | None, str]:
    """Whose kernel can do a prefix as one for all rows, and that in words; or None and why nobody's."""
    part = _one_row_of_the_prefix(p)
    reason = fused_attention.cannot(part)
    kernel = None if reason else fused_attention.preferred(part, training=training)
    if (kernel is None or not is_quick_on_a_prefix(kernel)) and flash4.cannot(part) is None:
        kernel = flash4.FLASH4_REPEATABLE
    if kernel is None:
        return None, reason or _no_kernel_for(p.query.dtype)
    return kernel, f"{kernel.name} does the prefix"


def is_quick_on_a_prefix(vendor: FusedAttention) -> bool:
    """Whether a vendor's kernels are quicker than ours on a prefix as one for all rows."""
    return vendor.name in FOLDED_VENDORS


def repeats(vendor: FusedAttention) -> bool:
    """Whether a vendor's gradients have the same bits on every run, if it is what its name says: a user may have put
    another FlashAttention behind PyTorch's op."""
    replaced = vendor is fused_attention.FLASH and fused_attention._active_flash() is not None
    return vendor.name in REPEATABLE and not replaced


def cannot_fold(p: AttentionProblem) -> str | None:
    """Why no vendor can do the prefix of `p` as one for all rows, in words; None if one may."""
    if not p.virtual_tokens:
        return "there is no prefix"
    if p.prefix_index is not None:
        return "rows name their own entry of a bank"
    if p.prefix_lengths is not None:
        return "how long the prefix is stands on the GPU"
    return None


def _one_row_of_the_prefix(p: AttentionProblem) -> AttentionProblem:
    """What is asked of a vendor about the prefix's part: the queries of one row stand for those of all."""
    prefix_key, prefix_value = (x.reshape(-1, *x.shape[-3:]).narrow(0, 0, 1) for x in (p.prefix_key, p.prefix_value))
    if prefix_key.dtype != p.query.dtype:  # only what it will be is asked for, nothing is computed
        prefix_key, prefix_value = (torch.empty_like(x, dtype=p.query.dtype) for x in (prefix_key, prefix_value))
    return prefix_part(p, p.query.narrow(0, 0, 1), prefix_key, prefix_value)


def prefix_part(p: AttentionProblem, query: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> AttentionProblem:
    """Attention of `query` [1, H, any, D] over a prefix [1, Hkv, P, D], as if it were a sequence of its own."""
    part = without_prefix(p)._replace(query=query, key=prefix_key, value=prefix_value, is_causal=False)
    return part._replace(padding=None, mask=None, sinks=None, cu_seqlens=None, sliding_window=0)


def _no_kernel_for(dtype: torch.dtype) -> str:
    return f"PyTorch has no fused kernel with a log-sum-exp for {str(dtype).removeprefix('torch.')}"
