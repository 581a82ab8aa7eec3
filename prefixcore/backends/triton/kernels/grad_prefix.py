"""The gradients of the prefix: every query that sees an entry of the bank, of all rows of the batch, in one sum.

Rows are folded as (batch, group, time) per key/value head, so that the sums over batch and group happen inside the
matrix products of :mod:`.grad_keys`. The rows are dealt out to a number of splits that depends on shapes alone; each
writes float32 partial sums, which a second kernel adds in a fixed order: no atomics, the same bits on every run.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import AttentionProblem
from . import launch
from .grad_keys import collect
from .tiles import length_of, load_statistics, load_tile, prefix_of, span, store_tile

_REDUCED = 1024
TILES_A_SPLIT = 4  # fewer tiles of rows than this are not worth a partial sum


@triton.jit(do_not_specialize=["sizes", "tiles", "row_splits", "sequence_splits", "batch", "scale"])
def grad_prefix_kernel(
    grad_key, grad_value, grad_out, lse, delta, query, prefix_key, prefix_value, bank, starts, sizes, scoring,
    tiles, row_splits, sequence_splits, batch, scale, GROUP: tl.constexpr, FOLDED: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program: KEYS virtual tokens of one entry and key/value head, one split of the rows.

    FOLDED: every sequence sees the one entry, and all of them are one run of rows; otherwise each is a run of its own.
    """
    program = tl.program_id(0)
    tile, kv_head = program % tiles, program // tiles % sizes.kv_heads
    entry = program // (tiles * sizes.kv_heads) % sizes.entries
    split = program // (tiles * sizes.kv_heads * sizes.entries)
    j = tile * KEYS + tl.arange(0, KEYS)
    length = length_of(entry, bank, sizes)
    counts = j < length
    wide_entry, wide_head = entry.to(tl.int64), kv_head.to(tl.int64)
    key_at = prefix_key.data + wide_entry * prefix_key.batch + wide_head * prefix_key.head
    value_at = prefix_value.data + wide_entry * prefix_value.batch + wide_head * prefix_value.head
    k = load_tile(key_at, j, prefix_key.row, counts, DIM, WIDTH, DTYPE)
    v = load_tile(value_at, j, prefix_value.row, counts, VALUE_DIM, VALUE_WIDTH, DTYPE)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, VALUE_WIDTH], tl.float32)

    runs = sizes.sequences
    if FOLDED:
        runs = tl.minimum(runs, 1)
    for n in range(split // row_splits, runs, sequence_splits):
        run = split * 0 + n
        first_batch, start, queries = run, run * 0, sizes.queries
        if starts is not None:
            first_batch = run * 0
            start, queries = span(run, starts, sizes)
        rows = GROUP * queries
        if FOLDED:
            rows *= batch
        else:
            seen, seen_length = prefix_of(run, bank, sizes)
            rows = tl.where((seen == entry) & (seen_length > 0), rows, 0)
        rows = tl.where(tile * KEYS < length, rows, 0)
        share = tl.cdiv(tl.cdiv(rows, row_splits), ROWS) * ROWS
        begin = split % row_splits * share
        end = tl.minimum(begin + share, rows)
        for at_row in range(begin, end, ROWS):
            row = at_row + tl.arange(0, ROWS)
            exists = row < end
            b = (first_batch + row // (GROUP * queries)).to(tl.int64)
            h = (kv_head * GROUP + row // queries % GROUP).to(tl.int64)
            t = (start + row % queries).to(tl.int64)
            q = load_tile(query.data, b * query.batch + h * query.head + t * query.row, 1, exists, DIM, WIDTH, DTYPE)
            do = load_tile(grad_out.data, b * grad_out.batch + h * grad_out.head + t * grad_out.row, 1, exists,
                           VALUE_DIM, VALUE_WIDTH, DTYPE)  # fmt: skip
            lse_i, delta_i = load_statistics(lse.data, b * lse.batch + h * lse.head + t * lse.row, 1,
                                             delta.data, b * delta.batch + h * delta.head + t * delta.row, 1,
                                             exists)  # fmt: skip
            dk, dv = collect(dk, dv, k, v, q, do, lse_i, delta_i, row, j, None, scoring, 0, None, DTYPE, False, False)
    dk = tl.where(counts[:, None], dk * scale, 0.0)
    dv = tl.where(counts[:, None], dv, 0.0)
    place = ((split * sizes.entries + entry) * sizes.kv_heads + kv_head).to(tl.int64) * sizes.virtual_tokens
    exists = j < sizes.virtual_tokens
    store_tile(grad_key + place * DIM, j, DIM, exists, dk, DIM, WIDTH)
    store_tile(grad_value + place * VALUE_DIM, j, VALUE_DIM, exists, dv, VALUE_DIM, VALUE_WIDTH)


@triton.jit(do_not_specialize=["count", "splits"])
def reduce_kernel(partials, total, count, splits, BLOCK: tl.constexpr):
    """``total = partials.sum(0)``, in the order of the splits."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = at < count
    sum = tl.zeros([BLOCK], tl.float32)
    place = at
    for _split in range(0, splits):
        sum += tl.load(partials + place, mask=exists, other=0.0)
        place += count
    tl.store(total + at, sum, mask=exists)


def _splits(p: AttentionProblem, blocks: launch.Blocks, folded: bool) -> tuple[int, int]:
    """``(over rows, over sequences)``: as many programs as keep a device busy, no split of too few rows."""
    entries = p.bank[0].shape[0]
    programs = triton.cdiv(p.virtual_tokens, blocks.keys) * p.kv_heads * entries
    wanted = triton.cdiv(launch.PROGRAMS, max(programs, 1))
    over_sequences = 1 if folded else min(wanted, max(p.sequences, 1))
    run = p.group * p.queries * (p.batch if folded else 1)
    if p.cu_seqlens is not None:
        run //= max(p.sequences, 1)
    over_rows = min(wanted // over_sequences, run // (blocks.rows * TILES_A_SPLIT))
    return max(over_rows, 1), over_sequences


def reduce_partials(partials: Tensor) -> Tensor:
    """``partials.sum(0)``, in the order of the first dimension."""
    if partials.shape[0] == 1:
        return partials[0]
    total = torch.empty_like(partials[0])
    launch.launch(
        reduce_kernel, triton.cdiv(total.numel(), _REDUCED), launch.Blocks(_REDUCED, 0, 4, 1), partials,
        partials=partials, total=total, count=total.numel(), splits=partials.shape[0], BLOCK=_REDUCED,
    )  # fmt: skip
    return total


def grad_prefix(p: AttentionProblem, grad_out: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """``[N, Hkv, P, D]`` and ``[N, Hkv, P, Dv]`` in float32, whole: zeros for what no row of the batch names.

    From ``grad_out`` [B, H, T, Dv] and the merged ``lse`` and ``delta`` [B, H, T].
    """
    blocks = launch.blocks_for("grad_prefix", p)
    entries, kv_heads, capacity, _ = p.bank[0].shape
    folded = p.prefix_index is None and p.cu_seqlens is None
    over_rows, over_sequences = _splits(p, blocks, folded)
    splits, tiles = over_rows * over_sequences, triton.cdiv(capacity, blocks.keys)
    grads = [
        torch.empty(splits, entries, kv_heads, capacity, dim, dtype=torch.float32, device=p.query.device)
        for dim in (p.head_dim, p.value_dim)
    ]
    arguments, constants = launch.arguments(p), launch.constants(p, blocks)
    for unused in ("key", "value", "padding", "mask", "window"):
        del arguments[unused]
    del constants["CAUSAL"]
    launch.launch(
        grad_prefix_kernel, tiles * kv_heads * entries * splits, blocks, p.query,
        grad_key=grads[0], grad_value=grads[1], grad_out=launch.view(grad_out), lse=launch.view(lse),
        delta=launch.view(delta), tiles=tiles, row_splits=over_rows, sequence_splits=over_sequences,
        batch=p.batch, scale=p.scale, FOLDED=folded, **arguments, **constants,
    )  # fmt: skip
    return reduce_partials(grads[0]), reduce_partials(grads[1])
