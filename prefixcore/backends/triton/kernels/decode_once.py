"""Few queries over many keys, in one launch: the keys are split among programs, and the last of them merges.

Two kinds of program stand in one grid:
* a *shared* program reads some keys of a prefix, once for all batch rows that see it: their queries are one tile of
  the matrix product (Juravsky et al., arXiv:2402.05099, section 3.1);
* an *own* program reads some keys of one batch row, for the queries of one group of heads. Where the prefix is short,
  or few rows share it, there are no shared programs: the prefix is the first of each row's keys.

Where one program has all keys of its queries it writes the output. Otherwise each leaves its output and log-sum-exp in
scratch, and adds one to its owner's counter (`counters`): an owner is one group's queries of one batch row. Whoever
brings it to its full count, which depends on shapes alone, merges all of the owner's splits in their order (Dao et al.,
Flash-Decoding, 2023), so that the bits do not depend on who came last, and puts the counter back to zero.

A store is seen by the one that merges: the barrier orders a program's stores before its `atomic_add`, which releases
them to the GPU and acquires what the others released. Scratch is allocated a call, in the order of its stream.

How the keys are shared out, and why so, is in `decode_schedule`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: E741  (l is the sum's name in the papers)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import AttentionProblem
from . import launch
from .counters import zeroed_counters
from .decode_merge import Rows, arrive, merge, store_partial, store_rows
from .decode_schedule import Work, shared_out
from .online_softmax import Keys, empty_state, update, update_sink
from .ranges import in_tiles
from .scores import Mask, ScoreMod, padding_of
from .sequences import prefix_length, prefix_of
from .tiles import INFINITY, Strided, head_of, load_tile

_SHARED_MERGED = 16  # queries that a shared program merges at a time
_MERGED = 16  # numbers that a thread reads at a time: their addresses take twice the registers


@triton.jit
def rows_of_owner(batch, kv_head, unit, sizes, work, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The queries of an owner. Their batch row and head are there also where the query does not exist."""
    lane = tl.arange(0, BLOCK)
    folded = unit * work.unit + lane
    exists = (lane < work.unit) & (folded < GROUP * sizes.queries)
    h = kv_head * GROUP + folded // sizes.queries % GROUP
    return Rows(lane * 0 + batch, h, folded % sizes.queries, exists)


@triton.jit
def rows_of_tile(tile, kv_head, first, size, sizes, work, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Of a tile of `size` queries, with as many whole owners as fit, those from `first` on."""
    lane = first + tl.arange(0, BLOCK)
    fit = size // work.unit
    owner = tile * fit + lane // work.unit  # of this key/value head
    b = owner // work.units
    folded = owner % work.units * work.unit + lane % work.unit
    exists = (lane // work.unit < fit) & (b < work.batches) & (folded < GROUP * sizes.queries)
    return Rows(b, kv_head * GROUP + folded // sizes.queries % GROUP, folded % sizes.queries, exists)


@triton.jit
def own_program(
    program, out, lse, scratch, counters, query, key, value, prefix_key, prefix_value, bank, padding, mask, sinks,
    sizes, scoring, window, work,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr, PREFIX: tl.constexpr, MERGED_M: tl.constexpr, MERGED_SPLITS: tl.constexpr,
):  # fmt: skip
    """One split of the keys of one owner. PREFIX: those of the prefix are the first of them."""
    unit, split = program % work.units, program // work.units % work.own_splits
    kv_head = program // (work.units * work.own_splits) % sizes.kv_heads
    batch = program // (work.units * work.own_splits * sizes.kv_heads)
    rows = rows_of_owner(batch, kv_head, unit, sizes, work, GROUP, BLOCK_M)
    i, exists = rows.i, rows.exists  # [BLOCK_M]
    wide_b, wide_h, wide_i = rows.b.to(tl.int64), rows.h.to(tl.int64), i.to(tl.int64)
    offsets = wide_b * query.batch_stride + wide_h * query.head_stride + wide_i * query.row_stride
    q = load_tile(Strided(query.data, 1), offsets, exists, HEAD_DIM, BLOCK_D, DTYPE)  # [BLOCK_M, BLOCK_D]

    acc, m, l = empty_state(BLOCK_M, BLOCK_DV)  # [BLOCK_M, BLOCK_DV], [BLOCK_M], [BLOCK_M]
    origin = batch * 0
    begin = split * work.own_share
    end = begin + work.own_share
    if PREFIX:
        entry, length = prefix_of(batch, bank, sizes)
        first, last = tl.minimum(begin, length), tl.minimum(end, length)
        keys = Keys(
            padding=None,
            key=head_of(prefix_key, entry, kv_head, origin),
            value=head_of(prefix_value, entry, kv_head, origin),
            tiles=in_tiles(first, first, last, last, BLOCK_N),
            score_mod=ScoreMod(scoring, mask=None, shift=0, window=None),
        )
        acc, m, l = update(acc, m, l, q, i, keys, HEAD_DIM, VALUE_DIM, BLOCK_N, CAUSAL=False)
        begin = tl.maximum(begin - sizes.virtual_tokens, 0)
        end = tl.maximum(end - sizes.virtual_tokens, 0)
    shift = sizes.keys - sizes.queries
    if window is not None:
        hidden = tl.maximum(shift - window + 1, 0)
        begin += hidden
        end += hidden
    end = tl.minimum(end, sizes.keys)
    begin = tl.minimum(begin, end)
    whole_begin, whole_end = begin, end
    if CAUSAL:
        whole_end = tl.minimum(end, shift + 1)
    if window is not None:
        whole_begin = tl.maximum(begin, sizes.keys - window)
    mask_at = None
    if mask is not None:
        base = mask.data + wide_b * mask.batch_stride + wide_h * mask.head_stride  # [BLOCK_M]
        mask_at = Mask(base[:, None], mask.row_stride, mask.key_stride, sizes.queries, sizes.keys)
    keys = Keys(
        padding=padding_of(padding, batch, origin),
        key=head_of(key, batch, kv_head, origin),
        value=head_of(value, batch, kv_head, origin),
        tiles=in_tiles(begin, whole_begin, whole_end, end, BLOCK_N),
        score_mod=ScoreMod(scoring, mask_at, shift, window),
    )
    acc, m, l = update(acc, m, l, q, i, keys, HEAD_DIM, VALUE_DIM, BLOCK_N, CAUSAL)

    if scratch is None:
        if sinks is not None:
            acc, m, l = update_sink(acc, m, l, tl.load(sinks + rows.h))
        sees = l != 0  # or NaN, which is left to be seen
        divisor = tl.where(sees, l, 1.0)
        log_sum_exp = tl.where(sees, m + tl.log2(divisor), -INFINITY)
        store_rows(out, lse, rows, acc / divisor[:, None], log_sum_exp, VALUE_DIM)
    else:
        store_partial(scratch, work.shared_splits + split, rows, acc, m, l, sizes, work, GROUP, VALUE_DIM)
        owner = (batch * sizes.kv_heads + kv_head) * work.units + unit
        if arrive(counters + owner, None, work.arrivals):
            owned = rows_of_owner(batch, kv_head, unit, sizes, work, GROUP, MERGED_M)
            merge(out, lse, scratch, owned, bank, sinks, sizes, work, GROUP, VALUE_DIM, BLOCK_DV, MERGED_SPLITS)
            tl.store(counters + owner, 0)


@triton.jit
def shared_program(
    program, out, lse, scratch, counters, query, prefix_key, prefix_value, bank, sinks, sizes, scoring, work,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr, THREADS: tl.constexpr,
    MERGED_M: tl.constexpr, MERGED_SPLITS: tl.constexpr,
):  # fmt: skip
    """One split of an entry of the bank, for the queries of a tile of owners."""
    tile, split = program % work.shared_tiles, program // work.shared_tiles % work.shared_splits
    kv_head = program // (work.shared_tiles * work.shared_splits) % sizes.kv_heads
    entry = program // (work.shared_tiles * work.shared_splits * sizes.kv_heads)
    rows = rows_of_tile(tile, kv_head, 0, BLOCK_M, sizes, work, GROUP, BLOCK_M)
    b, h, i, exists = rows.b, rows.h, rows.i, rows.exists  # [BLOCK_M]
    sees_entry = exists
    if bank.prefix_index is not None:
        named = tl.load(bank.prefix_index + b, mask=exists, other=-1)
        sees_entry = (named >= 0) & (tl.minimum(named, sizes.entries - 1) == entry)
    if tl.max(sees_entry.to(tl.int32), 0) > 0:
        offsets = (
            b.to(tl.int64) * query.batch_stride + h.to(tl.int64) * query.head_stride + i.to(tl.int64) * query.row_stride
        )
        q = load_tile(Strided(query.data, 1), offsets, sees_entry, HEAD_DIM, BLOCK_D, DTYPE)  # [BLOCK_M, BLOCK_D]
        origin = entry * 0
        length = prefix_length(entry, bank, sizes)
        begin = tl.minimum(split * work.shared_share, length)
        end = tl.minimum(begin + work.shared_share, length)
        keys = Keys(
            padding=None,
            key=head_of(prefix_key, entry, kv_head, origin),
            value=head_of(prefix_value, entry, kv_head, origin),
            tiles=in_tiles(begin, begin, end, end, BLOCK_N),
            score_mod=ScoreMod(scoring, mask=None, shift=0, window=None),
        )
        acc, m, l = empty_state(BLOCK_M, BLOCK_DV)  # [BLOCK_M, BLOCK_DV], [BLOCK_M], [BLOCK_M]
        acc, m, l = update(acc, m, l, q, i, keys, HEAD_DIM, VALUE_DIM, BLOCK_N, CAUSAL=False)
        store_partial(scratch, split, Rows(b, h, i, sees_entry), acc, m, l, sizes, work, GROUP, VALUE_DIM)

    # Also where nothing was to do: how many arrive must not depend on what is in a tensor.
    fit = BLOCK_M // work.unit
    place = tl.arange(0, THREADS)  # one owner a thread, though few are so many
    owner = tile * fit + place
    leads = (place < fit) & (owner < work.batches * work.units)  # [THREADS]
    counter = counters + (owner // work.units * sizes.kv_heads + kv_head) * work.units + owner % work.units
    completed = arrive(counter, leads, work.arrivals)  # [THREADS]
    if tl.max(completed.to(tl.int32), 0) > 0:
        for first in range(0, BLOCK_M, MERGED_M):
            owned = rows_of_tile(tile, kv_head, first, BLOCK_M, sizes, work, GROUP, MERGED_M)
            is_of = ((first + tl.arange(0, MERGED_M)) // work.unit)[:, None] == place[None, :]
            mine = tl.max((is_of & completed[None, :]).to(tl.int32), 1) > 0  # [MERGED_M]
            owned = Rows(owned.b, owned.h, owned.i, owned.exists & mine)
            merge(out, lse, scratch, owned, bank, sinks, sizes, work, GROUP, VALUE_DIM, BLOCK_DV, MERGED_SPLITS)
        tl.store(counter, 0, mask=completed)


@triton.jit(
    do_not_specialize=[
        "sizes", "window", "batches", "units", "unit", "own_splits", "own_share", "shared", "shared_tiles",
        "shared_splits", "shared_share", "arrivals",
    ]
)  # fmt: skip
def decode_once_kernel(
    out, lse, scratch, counters, query, key, value, prefix_key, prefix_value, bank, padding, mask, sinks, sizes,
    scoring, window,
    batches, units, unit, own_splits, own_share, shared, shared_tiles, shared_splits, shared_share, arrivals,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr, SHARED_M: tl.constexpr,
    PREFIX: tl.constexpr, THREADS: tl.constexpr, MERGED_M: tl.constexpr, MERGED_SPLITS: tl.constexpr,
    SHARED_MERGED_M: tl.constexpr, SHARED_MERGED_SPLITS: tl.constexpr,
):  # fmt: skip
    """One program, shared or own. SHARED_M: queries of a shared program, or 0 where there are none."""
    program = tl.program_id(0)
    work = Work(
        batches, units, unit, own_splits, own_share, shared, shared_tiles, shared_splits, shared_share, arrivals
    )
    if SHARED_M == 0:
        own_program(
            program, out, lse, scratch, counters, query, key, value, prefix_key, prefix_value, bank, padding, mask,
            sinks, sizes, scoring, window, work, GROUP, CAUSAL, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, BLOCK_M,
            BLOCK_N, DTYPE, PREFIX, MERGED_M, MERGED_SPLITS,
        )  # fmt: skip
    elif program < shared:
        shared_program(
            program, out, lse, scratch, counters, query, prefix_key, prefix_value, bank, sinks, sizes, scoring, work,
            GROUP, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, SHARED_M, BLOCK_N, DTYPE, THREADS,
            SHARED_MERGED_M, SHARED_MERGED_SPLITS,
        )  # fmt: skip
    else:
        own_program(
            program - shared, out, lse, scratch, counters, query, key, value, prefix_key, prefix_value, bank, padding,
            mask, sinks, sizes, scoring, window, work, GROUP, CAUSAL, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, BLOCK_M,
            BLOCK_N, DTYPE, PREFIX, MERGED_M, MERGED_SPLITS,
        )  # fmt: skip


def launch_decode_once(p: AttentionProblem, out: Tensor, lse: Tensor) -> None:
    """Writes `out` [B, H, T, Dv] and `lse` [B, H, T] as `forward.launch_forward` does; quick for a T of a few.

    Not for packed sequences. The scratch is float32: a [B, H, T, Dv] for each split.
    """
    if p.cu_seqlens is not None:
        raise ValueError("decode: expected one sequence in each batch row, got cu_seqlens: use forward.launch_forward")
    if p.query.numel() == 0:
        return
    blocks = launch.blocks_for("decode_once", p)
    work, block_m, shared_m = shared_out(p, blocks)
    blocks = blocks._replace(block_m=block_m)
    splits = work.shared_splits + work.own_splits
    scratch = counters = None
    if splits > 1:
        rows = p.batch * p.heads * p.queries
        scratch = launch.empty(splits * rows * (p.value_dim + 1), like=p.query, dtype=torch.float32)
        counters = launch.call(zeroed_counters, p.query, p.batch * p.kv_heads * work.units)
    merged_m, wide = triton.next_power_of_2(work.unit), launch.padded(p.value_dim)
    arguments = launch.arguments(p)
    del arguments["cu_seqlens"]
    launch.launch(
        decode_once_kernel, work.shared + p.batch * p.kv_heads * work.units * work.own_splits, blocks, p.query, p.key,
        out=launch.view(out), lse=launch.view(lse), scratch=scratch, counters=counters,
        sinks=launch.contiguous(p.sinks), SHARED_M=shared_m, PREFIX=p.virtual_tokens > 0 and not work.shared,
        THREADS=32 * blocks.warps, MERGED_M=merged_m, MERGED_SPLITS=_merged_splits(merged_m * wide, blocks.warps),
        SHARED_MERGED_M=_SHARED_MERGED, SHARED_MERGED_SPLITS=_merged_splits(_SHARED_MERGED * wide, blocks.warps),
        **work._asdict(), **arguments, **launch.constants(p, blocks),
    )  # fmt: skip


def _merged_splits(size: int, warps: int) -> int:
    """How many splits of so many numbers are read at a time, so that their latencies overlap."""
    return max(1, min(16, 32 * warps * _MERGED // size))
