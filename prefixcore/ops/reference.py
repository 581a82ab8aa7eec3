"""The references: slow, obvious, differentiable by autograd alone. They define correctness.

Both compute in float64 when they are given float64 and in float32 otherwise, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN = -1e30
"""An additive mask at or below this hides the key: libraries write minus infinity as the lowest finite number."""


def prefix_attention_reference(
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, Hkv, S, D]
    value: Tensor,  # [B, Hkv, S, Dv]
    prefix_key: Tensor,  # [Hkv, P, D] or a bank [N, Hkv, P, D]
    prefix_value: Tensor,  # [Hkv, P, Dv] or a bank [N, Hkv, P, Dv]
    prefix_index: Tensor | None,  # [B] (packed: one a sequence), -1: no prefix
    prefix_lengths: Tensor | None,  # [N]
    padding: Tensor | None,  # [B, S] bool
    mask: Tensor | None,  # [B, H, T, S] bool or additive
    sinks: Tensor | None,  # [H]
    cu_seqlens: Tensor | None,  # [sequences + 1]
    is_causal: bool,
    scale: float,
    sliding_window: int,  # 0: none
    softcap: float,  # 0: none
) -> tuple[Tensor, Tensor]:
    """One softmax over the prefix and the sequence; returns ``(out, lse)``.

    Arguments are as :func:`prefixcore.prefix_attention` normalises them. ``out`` has the dtype of
    ``query``, ``lse`` is the natural log of the softmax's denominator, ``-inf`` where a query sees
    nothing (its output is zero).
    """
    if cu_seqlens is not None:  # packed sequences are independent rows of one-row batches
        ends = cu_seqlens.tolist()
        parts = [
            prefix_attention_reference(
                query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], prefix_key, prefix_value,
                None if prefix_index is None else prefix_index[n : n + 1], prefix_lengths,
                None if padding is None else padding[:, a:b],
                None if mask is None else mask[:, :, a:b, a:b],
                sinks, None, is_causal, scale, sliding_window, softcap,
            )
            for n, (a, b) in enumerate(zip(ends, ends[1:], strict=False))
        ]  # fmt: skip
        return torch.cat([p[0] for p in parts], 2), torch.cat([p[1] for p in parts], 2)

    if prefix_key.dim() == 3:
        prefix_key, prefix_value = prefix_key[None], prefix_value[None]
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    bank, kv_heads, capacity, _ = prefix_key.shape
    index = torch.zeros(batch, dtype=torch.long) if prefix_index is None else prefix_index.long()
    index = index.to(query.device)
    lengths = torch.full((bank,), capacity) if prefix_lengths is None else prefix_lengths
    lengths = torch.where(index < 0, 0, lengths.to(query.device)[index.clamp(min=0)])  # [B]

    rows = index.clamp(min=0)
    all_keys = torch.cat([prefix_key[rows].to(compute), key.to(compute)], 2)  # [B, Hkv, P+S, D]
    all_values = torch.cat([prefix_value[rows].to(compute), value.to(compute)], 2)
    all_keys, all_values = (x.repeat_interleave(heads // kv_heads, 1) for x in (all_keys, all_values))

    i = torch.arange(queries, device=query.device)[:, None] + (keys - queries)  # counted from the end
    j = torch.arange(keys, device=query.device)
    visible = torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=query.device)
    if is_causal:
        visible = visible & (j <= i)
    if sliding_window > 0:
        visible = visible & (j > i - sliding_window)
    if padding is not None:
        visible = visible & padding[:, None, None, :]
    if mask is not None:
        visible = visible & (mask if mask.dtype == torch.bool else mask > HIDDEN)
    in_prefix = torch.arange(capacity, device=query.device) < lengths[:, None]  # [B, P]
    visible = torch.cat([in_prefix[:, None, None, :].expand(*visible.shape[:3], capacity), visible], -1)

    hidden = ~visible.flatten(1, 2).any(1)[:, None, :, None]  # what no query sees may hold anything, even NaN
    all_keys, all_values = all_keys.masked_fill(hidden, 0), all_values.masked_fill(hidden, 0)

    scores = scale * (query.to(compute) @ all_keys.transpose(-1, -2))  # [B, H, T, P+S]
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype != torch.bool:
        bias = torch.where(mask > HIDDEN, mask.to(compute), 0)
        scores = scores + torch.cat([bias.new_zeros(*bias.shape[:3], capacity), bias], -1)
    scores = scores.masked_fill(~visible, -torch.inf)

    logits = scores
    if sinks is not None:
        logits = torch.cat([scores, sinks.to(compute)[None, :, None, None].expand(batch, -1, queries, 1)], -1)
    lse = torch.logsumexp(logits, -1)  # [B, H, T]
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0, lse)[..., None])
    out = (weights @ all_values).to(query.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse  # laid out as [B, T, H, Dv]


def soft_embedding_reference(input_ids: Tensor, weight: Tensor, virtual: Tensor) -> Tensor:
    """Rows of ``weight`` [V, E] for ids below V, rows of ``virtual`` [N, E] for the others."""
    table = torch.cat([weight.detach(), virtual.to(weight.dtype)])
    return torch.nn.functional.embedding(input_ids, table)
