"""`prefix_attention`: attention over a learned prefix and a sequence in one softmax."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from ..backends import gradients
from ..backends.checks import check_storage
from ..backends.problem import AttentionProblem
from .attention_checks import (
    cast_for_autocast,
    check_bank,
    check_options,
    check_packing,
    check_prefix,
    check_sequence,
    check_values,
    split_mask,
)
from .checks import check_dense, check_derivatives, check_tensor, device_type_of
from .reference import prefix_attention_reference
from .select import backend_name

_ENDLESS = 2**31 - 1
"""A sliding window that no sequence fills; the kernels count with larger ones past the end of an int64."""


@overload
def prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor | None = None, prefix_value: Tensor | None = None,
    *, prefix_index: Tensor | None = None, prefix_lengths: Tensor | None = None, attn_mask: Tensor | None = None,
    is_causal: bool = True, scale: float | None = None, sliding_window: int | None = None,
    softcap: float | None = None, sinks: Tensor | None = None, cu_seqlens: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor | None = None, prefix_value: Tensor | None = None,
    *, prefix_index: Tensor | None = None, prefix_lengths: Tensor | None = None, attn_mask: Tensor | None = None,
    is_causal: bool = True, scale: float | None = None, sliding_window: int | None = None,
    softcap: float | None = None, sinks: Tensor | None = None, cu_seqlens: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    *,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which every query sees a learned prefix and its part of the sequence.

    `softmax(scale * query @ [prefix_key; key]^T) @ [prefix_value; value]`, computed with an online softmax
    (Milakov and Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135) and never by concatenating: the
    prefix is read as one more block of keys, shared by all rows of the batch and all heads of a group. Prefix
    tuning is Li and Liang, arXiv:2101.00190.

    Args:
        query: `[B, H, T, D]`.
        key, value: `[B, Hkv, S, D]` and `[B, Hkv, S, Dv]`; H is a multiple of Hkv. `query`, `key` and
            `value` share one dtype (float32, bfloat16, float16; float64 runs the reference) and device, and
            may have any strides as long as the last dimension is contiguous.
        prefix_key, prefix_value: `[Hkv, P, D]` and `[Hkv, P, Dv]`, seen by every row; or a prompt bank
            `[N, Hkv, P, D]` and `[N, Hkv, P, Dv]`; or `None`: plain attention. In the dtype of `query`,
            or float32 (a master copy, which products in bfloat16 round as autocast rounds a weight).
        prefix_index: int64 or int32 `[B]` (packed: one a sequence): each row's entry of the bank, -1 for no
            prefix. Needed if the bank has more than one entry.
        prefix_lengths: int64 or int32 `[N]`: how many virtual tokens of each entry count; the rest are
            padding.
        attn_mask: over the sequence's keys only. Two dimensions mean a padding mask `[B, S]` (bool alone, True is
            visible), which has a path of its own; three or four broadcast to `[B, H, T, S]`, bool or
            additive (at or below -1e30, as at minus infinity, the key is hidden; NaN makes the output of its
            query NaN). Write a mask `[T, S]` as `mask[None, None]`. Gets no gradient.
        is_causal: query i sees keys `j <= i + S - T`: aligned bottom-right, so that the last query sees
            every key (decoding with a cache). Note that PyTorch's SDPA aligns top-left.
        scale: of the scores; `1 / sqrt(D)` if None. Its size, that of `softcap` and that of
            `scale / softcap` are from 1e-30 to 1e30, which float32 arithmetic holds; `scale` may be 0.
        sliding_window: query i sees keys `j > i + S - T - sliding_window` only. The prefix is always seen.
        softcap: scores become `softcap * tanh(score / softcap)`, before the mask.
        sinks: `[H]`: one more logit a head in the softmax's denominator. Gets no gradient.
        cu_seqlens: int64 or int32 `[sequences + 1]`, from 0 to T: B is 1, S is T, and each packed sequence
            sees the prefix and itself.
        return_lse: also return the natural log of the softmax's denominator.

    Returns:
        `[B, H, T, Dv]` in the dtype of `query`, laid out as `[B, T, H, Dv]` so that transposing it back
        is free; with `return_lse` also `[B, H, T]` in float32. A query that sees nothing yields zeros and
        `-inf`. Gradients flow from both into query, key, value, prefix_key and prefix_value, each computed
        only where it is asked for; the prefix's are summed in float32 in a fixed order.

    Raises:
        ValueError, TypeError, IndexError: what was expected, what came, how to mend it; before any work.
        NotImplementedError: under `torch.func.grad`, `vjp` and `jvp`, which the reference can.

    Examples:
        >>> query = torch.randn(2, 8, 16, 64)  # [B, H, T, D]
        >>> key, value = torch.randn(2, 2, 2, 16, 64)  # [B, Hkv, S, D]
        >>> prefix_key = torch.randn(2, 20, 64, requires_grad=True)  # [Hkv, P, D]
        >>> prefix_value = torch.randn(2, 20, 64, requires_grad=True)
        >>> out = prefixcore.prefix_attention(query, key, value, prefix_key, prefix_value)
        >>> out.shape
        torch.Size([2, 8, 16, 64])
        >>> out.sum().backward()
        >>> prefix_key.grad.shape  # summed over rows and heads
        torch.Size([2, 20, 64])
    """
    check_tensor("query", query)
    check_tensor("key", key)
    check_tensor("value", value)
    device_type = device_type_of(query)
    try:
        if device_type != "meta" and torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
            query, key, value = cast_for_autocast(dtype, query=query, key=key, value=value)
        check_sequence(query, key, value)
        prefix_key, prefix_value = check_prefix(
            query, key, value, prefix_key, prefix_value, prefix_index, prefix_lengths
        )
        packed = 0 if cu_seqlens is None else check_packing(query, key, cu_seqlens)
        check_bank(query, prefix_key, prefix_index, prefix_lengths, packed)
        padding, mask = split_mask(query, key, attn_mask, prefix_key.shape[-2])
    except RuntimeError:  # nested tensors have no shape, and what has lost its memory cannot be viewed
        check_dense(query=query, key=key, value=value, prefix_key=prefix_key, prefix_value=prefix_value)
        if attn_mask is not None:
            check_storage("attn_mask", attn_mask)
        raise
    check_options(query, is_causal, scale, sliding_window, softcap, sinks)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[3])

    p = AttentionProblem(
        query, key, value, prefix_key, prefix_value, prefix_index, prefix_lengths, padding, mask, sinks, cu_seqlens,
        is_causal, scale, 0 if sliding_window is None else min(sliding_window, _ENDLESS), softcap or 0.0,
    )  # fmt: skip
    if backend_name("prefix_attention", device_type, query.dtype) != "reference":
        plain = check_derivatives("prefix_attention")
        try:
            out, lse = gradients.prefix_attention(p) if plain else torch.ops.prefixcore.prefix_attention(*p)
        except RuntimeError:  # NotImplementedError is one
            check_dense(query=query, key=key, value=value, prefix_key=prefix_key, prefix_value=prefix_value)
            raise
    else:
        check_values(p)
        out, lse = prefix_attention_reference(p)
    return (out, lse) if return_lse else out
