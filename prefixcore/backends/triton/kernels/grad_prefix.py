"""The gradients of the prefix: the sum over every query, of every batch row, that sees an entry of the bank.

Queries are folded as (batch, group, time) for each key/value head, so that the sums over batch and group happen inside
the matrix products. The queries are split by shapes alone; each split writes float32 partial sums, which a second
kernel adds in a fixed order: no atomics, the same bits on every run.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import AttentionProblem
from . import launch
from .delta import Upstream, delta_of
from .grad_tile import add_queries
from .scores import ScoreMod
from .sequences import packed_span, prefix_length, prefix_of
from .tiles import Strided, head_of, load_log_sum_exp, load_tile, offsets_of, store_tile

_REDUCED = 1024
TILES_PER_SPLIT = 4  # fewer tiles of queries than this are not worth a partial sum


@triton.jit
def write_grad_prefix(
    tile, kv_head, entry, split, grad_key, grad_value, upstream, query, prefix_key, prefix_value, bank, cu_seqlens,
    sizes, scoring, query_splits, sequence_splits, batch, scale, GROUP: tl.constexpr, FOLDED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Writes what one split of the queries gives to BLOCK_N virtual tokens of an entry and key/value head.

    `grad_key` and `grad_value` are where the split's gradients [N, Hkv, P, D] and [N, Hkv, P, Dv] begin.
    FOLDED: every sequence sees the one entry, and the queries of all are folded into one run, (batch, group, time).
    Otherwise the queries of each sequence are a run of their own, (group, time).
    """
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    length = prefix_length(entry, bank, sizes)
    counts = j < length
    origin = entry * 0
    k_head, v_head = head_of(prefix_key, entry, kv_head, origin), head_of(prefix_value, entry, kv_head, origin)
    k = load_tile(k_head, j, counts, HEAD_DIM, BLOCK_D, DTYPE)  # [BLOCK_N, BLOCK_D]
    v = load_tile(v_head, j, counts, VALUE_DIM, BLOCK_DV, DTYPE)  # [BLOCK_N, BLOCK_DV]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    score_mod = ScoreMod(scoring, mask=None, shift=0, window=None)

    runs = sizes.sequences
    if FOLDED:
        runs = tl.minimum(runs, 1)
    for n in range(split // query_splits, runs, sequence_splits):
        run = split * 0 + n
        first_batch, start, queries = run, run * 0, sizes.queries
        if cu_seqlens is not None:
            first_batch = run * 0
            start, queries = packed_span(run, cu_seqlens, sizes)
        in_run = GROUP * queries
        if FOLDED:
            in_run *= batch
        else:
            seen, seen_length = prefix_of(run, bank, sizes)
            in_run = tl.where((seen == entry) & (seen_length > 0), in_run, 0)
        in_run = tl.where(tile * BLOCK_N < length, in_run, 0)
        share = tl.cdiv(tl.cdiv(in_run, query_splits), BLOCK_M) * BLOCK_M
        begin = split % query_splits * share
        end = tl.minimum(begin + share, in_run)
        for first in range(begin, end, BLOCK_M):
            folded = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
            exists = folded < end
            b = first_batch + folded // (GROUP * queries)
            h = kv_head * GROUP + folded // queries % GROUP
            t = start + folded % queries
            q_at = offsets_of(query, b, h, t)  # [BLOCK_M]
            q = load_tile(Strided(query.data, 1), q_at, exists, HEAD_DIM, BLOCK_D, DTYPE)  # [BLOCK_M, BLOCK_D]
            do_at = offsets_of(upstream.grad_out, b, h, t)
            do_rows = Strided(upstream.grad_out.data, 1)
            do = load_tile(do_rows, do_at, exists, VALUE_DIM, BLOCK_DV, DTYPE)  # [BLOCK_M, BLOCK_DV]
            delta = delta_of(upstream, b, h, t, exists, do, VALUE_DIM)  # [BLOCK_M]
            lse_at = offsets_of(upstream.lse, b, h, t)
            lse = load_log_sum_exp(Strided(upstream.lse.data, 1), lse_at, exists)  # [BLOCK_M]
            dk, dv, _ds = add_queries(dk, dv, k, v, q, do, lse, delta, folded, j, None, score_mod, False, False)
    dk = tl.where(counts[:, None], dk * scale, 0.0)
    dv = tl.where(counts[:, None], dv, 0.0)
    place = (entry * sizes.kv_heads + kv_head).to(tl.int64) * sizes.virtual_tokens
    exists = j < sizes.virtual_tokens
    store_tile(Strided(grad_key + place * HEAD_DIM, HEAD_DIM), j, exists, dk, HEAD_DIM)
    store_tile(Strided(grad_value + place * VALUE_DIM, VALUE_DIM), j, exists, dv, VALUE_DIM)


@triton.jit(do_not_specialize=["sizes", "tiles", "query_splits", "sequence_splits", "batch", "scale"])
def grad_prefix_kernel(
    grad_key, grad_value, grad_out, lse, delta, query, prefix_key, prefix_value, bank, cu_seqlens, sizes, scoring,
    tiles, query_splits, sequence_splits, batch, scale, GROUP: tl.constexpr, FOLDED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N virtual tokens of one entry and key/value head, one split of the queries."""
    program = tl.program_id(0)
    tile, kv_head = program % tiles, program // tiles % sizes.kv_heads
    entry = program // (tiles * sizes.kv_heads) % sizes.entries
    split = program // (tiles * sizes.kv_heads * sizes.entries)
    before = (split * sizes.entries * sizes.kv_heads).to(tl.int64) * sizes.virtual_tokens
    write_grad_prefix(
        tile, kv_head, entry, split, grad_key + before * HEAD_DIM, grad_value + before * VALUE_DIM,
        Upstream(grad_out, lse, delta, out=None, grad_lse=None), query, prefix_key, prefix_value, bank, cu_seqlens,
        sizes, scoring, query_splits, sequence_splits, batch, scale, GROUP, FOLDED, HEAD_DIM, BLOCK_D, VALUE_DIM,
        BLOCK_DV, BLOCK_M, BLOCK_N, DTYPE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "splits"])
def reduce_kernel(partials, total, count, splits, BLOCK: tl.constexpr):
    """`total = partials.sum(0)`, in the order of the splits."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = at < count
    sum = tl.zeros([BLOCK], tl.float32)
    place = at
    for _split in range(0, splits):
        sum += tl.load(partials + place, mask=exists, other=0.0)
        place += count
    tl.store(total + at, sum, mask=exists)


def splits_of(p: AttentionProblem, blocks: launch.Blocks, folded: bool) -> tuple[int, int]:
    """`(query_splits, sequence_splits)`: as many programs as keep a device busy, no split of too few queries."""
    entries = p.bank[0].shape[0]
    programs = triton.cdiv(p.virtual_tokens, blocks.block_n) * p.kv_heads * entries
    wanted = triton.cdiv(launch.PROGRAMS, max(programs, 1))
    sequence_splits = 1 if folded else min(wanted, max(p.sequences, 1))
    run = p.group * p.queries * (p.batch if folded else 1)
    if p.cu_seqlens is not None:
        run //= max(p.sequences, 1)
    query_splits = min(wanted // sequence_splits, run // (blocks.block_m * TILES_PER_SPLIT))
    return max(query_splits, 1), sequence_splits


def reduce_partials(partials: Tensor) -> Tensor:
    """`partials.sum(0)`, in the order of the first dimension."""
    if partials.shape[0] == 1:
        return partials[0]
    total = launch.empty(*partials.shape[1:], like=partials)
    launch.launch(
        reduce_kernel, triton.cdiv(total.numel(), _REDUCED), launch.Blocks(_REDUCED, 0, 4, 1), partials,
        partials=partials, total=total, count=total.numel(), splits=partials.shape[0], BLOCK=_REDUCED,
    )  # fmt: skip
    return total


def launch_grad_prefix(p: AttentionProblem, grad_out: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the bank, [N, Hkv, P, D] and [N, Hkv, P, Dv] in float32: zeros for what no batch row sees.

    From `grad_out` [B, H, T, Dv], the log-sum-exp of prefix and sequence together, and `delta.compute_delta`'s
    (both [B, H, T]).
    """
    blocks = launch.blocks_for("grad_prefix", p)
    entries, kv_heads, capacity, _ = p.bank[0].shape
    folded = p.prefix_index is None and p.cu_seqlens is None
    query_splits, sequence_splits = splits_of(p, blocks, folded)
    splits, tiles = query_splits * sequence_splits, triton.cdiv(capacity, blocks.block_n)
    grads = [
        launch.empty(splits, entries, kv_heads, capacity, dim, like=p.query, dtype=torch.float32)
        for dim in (p.head_dim, p.value_dim)
    ]
    arguments, constants = launch.arguments(p), launch.constants(p, blocks)
    for unused in ("key", "value", "padding", "mask", "window"):
        del arguments[unused]
    del constants["CAUSAL"]
    launch.launch(
        grad_prefix_kernel, tiles * kv_heads * entries * splits, blocks, p.query,
        grad_key=grads[0], grad_value=grads[1], grad_out=launch.view(grad_out), lse=launch.view(lse),
        delta=launch.view(delta), tiles=tiles, query_splits=query_splits, sequence_splits=sequence_splits,
        batch=p.batch, scale=p.scale, FOLDED=folded, **arguments, **constants,
    )  # fmt: skip
    return reduce_partials(grads[0]), reduce_partials(grads[1])
