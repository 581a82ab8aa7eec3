"""FlashAttention-4's two functions, signatures as in flash-attn-4 4.0.0b36, computed slowly in float64 on any device.

They are called as the package's own would be: an argument that it does not have is an error here, too. What is not
computed here is refused. Masks are aligned bottom-right, the log-sum-exp is natural and counts the sink.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

VERSION = "4.0.0b36"

asked: list[bool] = []
"""What each backward was asked for."""


def _flash_attn_fwd(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
    max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
    window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
    intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
    block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None,
    q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None,
    seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
):  # fmt: skip
    _refuse(locals(), qv, seqused_q, max_seqlen_q, max_seqlen_k, min_seqlen_k, page_table, window_size_right, tile_mn,
            mma_pv_is_rs, intra_wg_overlap, pack_gqa, _arch, score_mod, mask_mod, block_sparse_tensors, out, lse,
            aux_tensors, aux_scalars, q_descale, k_descale, v_descale, gather_kv_indices, scheduler_metadata,
            seqlen_k_per_split)  # fmt: skip
    assert return_lse
    assert learnable_sink is None or learnable_sink.dtype in (torch.float16, torch.bfloat16, torch.float32)
    out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device)
    heads = (q.shape[1], q.shape[0]) if cu_seqlens_q is not None else (q.shape[0], q.shape[2], q.shape[1])
    lse = torch.full(heads, torch.nan, dtype=torch.float32, device=q.device)
    for rows, keys in _sequences(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k):
        scores, _ = _scores(q[rows], k[keys], softmax_scale, causal, softcap, window_size_left)
        if learnable_sink is not None:
            sink = learnable_sink.double()[:, None, None].expand(-1, scores.shape[1], 1)
            of_all = torch.cat([scores, sink], -1).logsumexp(-1)
        else:
            of_all = scores.logsumexp(-1)
        weights = (scores - of_all[..., None]).exp().nan_to_num(0)  # of a query that sees nothing
        out[rows] = (weights @ _grouped(v[keys], q)).transpose(0, 1).to(q.dtype)
        _of(lse, rows, cu_seqlens_q is not None).copy_(of_all)
    return out, lse, None, None, None


def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
    num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
    AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
    max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None,
    score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None,
    learnable_sink=None,
):  # fmt: skip
    _refuse(locals(), window_size_right, seqused_q, max_seqlen_q, max_seqlen_k, dq, dk, dv, score_mod, score_mod_bwd,
            mask_mod, aux_tensors, aux_scalars, block_sparse_tensors, dlse, learnable_sink)  # fmt: skip
    assert q.dtype == k.dtype == v.dtype == out.dtype == dout.dtype
    assert lse.dtype == torch.float32
    asked.append(deterministic)
    dq, dk, dv = (torch.full(x.shape, torch.nan, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for rows, keys in _sequences(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k):
        scores, slope = _scores(q[rows], k[keys], softmax_scale, causal, softcap, window_size_left)
        of_all = _of(lse, rows, cu_seqlens_q is not None).double()[..., None]
        weights = (scores - of_all).exp().masked_fill(~of_all.isfinite(), 0)  # [H, T, S]
        grad, o = (x[rows].double().transpose(0, 1) for x in (dout, out))  # [H, T, D]
        ds = weights * (grad @ _grouped(v[keys], q).transpose(-1, -2) - (grad * o).sum(-1, keepdim=True)) * slope
        dq[rows] = (softmax_scale * ds @ _grouped(k[keys], q)).transpose(0, 1).to(q.dtype)
        dk[keys] = _summed(softmax_scale * ds.transpose(-1, -2) @ q[rows].double().transpose(0, 1), k).to(k.dtype)
        dv[keys] = _summed(weights.transpose(-1, -2) @ grad, v).to(v.dtype)
    return dq, dk, dv


def _refuse(arguments: dict[str, Any], *unused: Any) -> None:
    """Of an argument that is not computed with nothing but its default may come."""
    assert all(x is None for x in unused), {name: x for name, x in arguments.items() if x is not None}
    for name in ("q", "k", "v", "out", "dout"):
        x = arguments.get(name)
        assert x is None or x.stride(-1) == 1, f"{name}: rows are contiguous"
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k"):
        x = arguments[name]
        assert x is None or (x.dtype == torch.int32 and x.is_contiguous()), name


def _sequences(q: Tensor, k: Tensor, query_ends: Any, key_ends: Any, used: Any) -> Iterator[tuple[Any, Any]]:
    """Where the queries and keys of each sequence are."""
    if query_ends is None:
        for b in range(q.shape[0]):
            yield (b, slice(0, q.shape[1])), (b, slice(0, k.shape[1] if used is None else int(used[b])))
    else:
        ends = zip(query_ends.tolist(), query_ends.tolist()[1:], key_ends.tolist(), key_ends.tolist()[1:], strict=False)
        for a, b, c, d in ends:
            assert 0 <= a <= b <= len(q)
            assert 0 <= c <= d <= len(k)
            yield slice(a, b), slice(c, d)


def _of(lse: Tensor, rows: Any, packed: bool) -> Tensor:
    return lse[:, rows] if packed else lse[rows[0]]


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, softcap: Any, left: int | None) -> tuple[Tensor, Tensor]:
    """Scores [H, T, S], -inf where hidden, and what the softcap multiplies their gradient with."""
    scores = scale * q.double().transpose(0, 1) @ _grouped(k, q).transpose(-1, -2)
    slope = torch.ones_like(scores)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
        slope = 1 - (scores / softcap) ** 2
    i = torch.arange(len(q), device=q.device)[:, None] + len(k) - len(q)
    j = torch.arange(len(k), device=q.device)
    hidden = torch.zeros(len(q), len(k), dtype=torch.bool, device=q.device)
    if causal:
        hidden |= j > i
    if left is not None:
        hidden |= j < i - left
    return scores.masked_fill(hidden, -torch.inf), slope


def _grouped(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values [S, Hkv, D] as [H, S, D]."""
    return x.double().transpose(0, 1).repeat_interleave(q.shape[-2] // x.shape[-2], 0)


def _summed(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient [H, S, D] as that of `x` [S, Hkv, D]."""
    heads = x.shape[-2]
    return grad.unflatten(0, (heads, -1)).sum(1).transpose(0, 1)
