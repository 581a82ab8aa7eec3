"""The references: slow, obvious, differentiable by autograd alone. They define correctness.

Both compute in float64 when they are given float64 and in float32 otherwise, on any device.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from ..backends.problem import AttentionProblem

HIDDEN = -1e30
"""An additive mask at or below this hides the key: libraries write minus infinity as the lowest finite number. NaN does
not: the output of a query that sees it is NaN."""


def prefix_attention_reference(p: AttentionProblem) -> tuple[Tensor, Tensor]:
    """One softmax over the prefix and the sequence; returns `(out, lse)`.

    `out` has the dtype of `query`, `lse` is the natural log of the softmax's denominator, `-inf` where a query
    sees nothing (its output is zero).
    """
    if p.cu_seqlens is not None:  # packed sequences are independent rows of one-row batches
        ends = [0, p.queries] if p.cu_seqlens.is_meta else p.cu_seqlens.tolist()
        parts = [prefix_attention_reference(_packed(p, n, a, b)) for n, (a, b) in enumerate(itertools.pairwise(ends))]
        out = torch.cat([out.transpose(1, 2) for out, _ in parts], 1).transpose(1, 2)  # laid out as [B, T, H, Dv]
        return out, torch.cat([lse for _, lse in parts], 2)

    query, compute = p.query, torch.float64 if p.query.dtype == torch.float64 else torch.float32
    prefix_key, prefix_value = p.bank  # [N, Hkv, P, D], [N, Hkv, P, Dv]
    index = torch.zeros(p.batch, dtype=torch.long) if p.prefix_index is None else p.prefix_index.long()
    index = index.to(query.device)
    lengths = torch.full((len(prefix_key),), p.virtual_tokens) if p.prefix_lengths is None else p.prefix_lengths
    lengths = torch.where(index < 0, 0, lengths.to(query.device)[index.clamp(min=0)])  # [B]

    rows = index.clamp(min=0)
    keys = torch.cat([prefix_key[rows].to(compute), p.key.to(compute)], 2)  # [B, Hkv, P+S, D]
    values = torch.cat([prefix_value[rows].to(compute), p.value.to(compute)], 2)  # [B, Hkv, P+S, Dv]
    keys, values = (x.repeat_interleave(p.group, 1) for x in (keys, values))  # [B, H, ...]

    i = torch.arange(p.queries, device=query.device)[:, None] + (p.keys - p.queries)  # counted from the end
    j = torch.arange(p.keys, device=query.device)
    visible = torch.ones(p.batch, 1, p.queries, p.keys, dtype=torch.bool, device=query.device)
    if p.is_causal:
        visible = visible & (j <= i)
    if p.sliding_window > 0:
        visible = visible & (j > i - p.sliding_window)
    if p.padding is not None:
        visible = visible & p.padding[:, None, None, :]
    if p.mask is not None:
        visible = visible & (p.mask if p.mask.dtype == torch.bool else ~(p.mask <= HIDDEN))
    in_prefix = torch.arange(p.virtual_tokens, device=query.device) < lengths[:, None]  # [B, P]
    visible = torch.cat([in_prefix[:, None, None, :].expand(*visible.shape[:3], -1), visible], -1)

    hidden = ~visible.flatten(1, 2).any(1)[:, None, :, None]  # what no query sees may hold anything, even NaN
    keys, values = keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)

    scores = p.scale * (query.to(compute) @ keys.transpose(-1, -2))  # [B, H, T, P+S]
    if p.softcap > 0:
        scores = p.softcap * torch.tanh(scores / p.softcap)
    if p.mask is not None and p.mask.dtype != torch.bool:
        bias = torch.where(p.mask <= HIDDEN, 0, p.mask.to(compute))
        scores = scores + torch.cat([bias.new_zeros(*bias.shape[:3], p.virtual_tokens), bias], -1)
    scores = scores.masked_fill(~visible, -torch.inf)

    logits = scores
    if p.sinks is not None:
        sinks = p.sinks.to(compute)[None, :, None, None].expand(p.batch, -1, p.queries, 1)
        logits = torch.cat([scores, sinks], -1)
    lse = torch.logsumexp(logits, -1)  # [B, H, T]
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0, lse)[..., None]).masked_fill(~visible, 0)
    out = (weights @ values).to(query.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse  # laid out as [B, T, H, Dv]


def _packed(p: AttentionProblem, n: int, a: int, b: int) -> AttentionProblem:
    """The n-th packed sequence, tokens a to b, as a row of its own."""
    return p._replace(
        query=p.query[:, :, a:b],
        key=p.key[:, :, a:b],
        value=p.value[:, :, a:b],
        prefix_index=None if p.prefix_index is None else p.prefix_index[n : n + 1],
        padding=None if p.padding is None else p.padding[:, a:b],
        mask=None if p.mask is None else p.mask[:, :, a:b, a:b],
        cu_seqlens=None,
    )


def soft_embedding_reference(input_ids: Tensor, weight: Tensor, virtual: Tensor) -> Tensor:
    """Rows of `weight` [V, E] for ids below V, rows of `virtual` [N, E] for the others."""
    vocabulary = weight.shape[0]
    frozen = _lookup(weight.detach(), input_ids.clamp(max=max(vocabulary - 1, 0)))
    trained = _lookup(virtual.to(weight.dtype), (input_ids - vocabulary).clamp(min=0))
    return torch.where((input_ids >= vocabulary)[..., None], trained, frozen)


def _lookup(table: Tensor, rows: Tensor) -> Tensor:
    """`embedding`; an empty table, of which no row is used, gets one of zeros."""
    return functional.embedding(rows, table if len(table) else functional.pad(table, (0, 0, 0, 1)))
