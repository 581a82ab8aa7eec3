"""Forward: an online softmax over tiles of keys, first the prefix's, then the sequence's.

For each tile of query rows the running maximum m, denominator l and output O absorb one tile of keys after another
(Milakov and Gimelshein, arXiv:1805.02867, algorithm 3; Dao, arXiv:2307.08691, algorithm 1):
    m' = max(m, scores),  p = 2^(scores - m'),  l' = l 2^(m - m') + sum p,  O' = O 2^(m - m') + p V.
The prefix is nothing but more keys. If another kernel has already attended to the sequence, its output and lse are a
state of this softmax (m = lse, l = 1, O = output), and the prefix alone is absorbed into it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from torch import Tensor

from ...problem import AttentionProblem
from . import launch
from .tiles import (
    INFINITY,
    LN2,
    LOG2E,
    LOWEST,
    at,
    dot,
    finish_scores,
    in_tiles,
    kept,
    keys_seen,
    load_tile,
    locate,
    mask_of,
    padding_of,
    prefix_of,
    store_tile,
    tile_of_program,
    tile_start,
)  # fmt: skip


@triton.jit
def absorb(
    acc, peak, total, q, i, keys, padding, begin, count, whole, left, end, mask, scoring, shift, window,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    KEYS: tl.constexpr, DTYPE: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Takes ``count`` tiles of keys into the softmax; ``keys`` says where they lie."""
    key, key_row, value, value_row = keys
    for n in range(0, count):
        j = tile_start(n, begin, whole, left, KEYS, EDGE) + tl.arange(0, KEYS)
        keep = kept(j, end, padding, EDGE)
        k = load_tile(key, j, key_row, keep, DIM, WIDTH, DTYPE)
        v = load_tile(value, j, value_row, keep, VALUE_DIM, VALUE_WIDTH, DTYPE)
        scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], KEYS], tl.float32))
        if keep is not None:
            keep = keep[None, :]
        scores, _slope = finish_scores(scores, i[:, None], j[None, :], keep, mask, scoring, shift, window, CAUSAL, EDGE)
        higher = tl.maximum(peak, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = dot(p.to(DTYPE), v, acc * shrink[:, None])
        peak = higher
    return acc, peak, total


@triton.jit
def absorb_prefix(
    acc, peak, total, q, i, prefix_key, prefix_value, entry, kv_head, begin, end, scoring,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    KEYS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Takes virtual tokens ``[begin, end)`` of an entry into the softmax: seen by every query."""
    keys = (
        at(prefix_key, entry, kv_head, entry * 0), prefix_key.row,
        at(prefix_value, entry, kv_head, entry * 0), prefix_value.row,
    )  # fmt: skip
    rest, whole, left, edges = in_tiles(begin, begin, end, end, KEYS)
    acc, peak, total = absorb(
        acc, peak, total, q, i, keys, None, rest, whole, whole, left, end, None, scoring, 0, None,
        DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, KEYS, DTYPE, False, False,
    )  # fmt: skip
    return absorb(
        acc, peak, total, q, i, keys, None, begin, edges, whole, left, end, None, scoring, 0, None,
        DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, KEYS, DTYPE, False, True,
    )  # fmt: skip


@triton.jit
def absorb_sink(acc, peak, total, sink):
    """A sink is a key without a value: it only opens the denominator."""
    sink = sink.to(tl.float32) * LOG2E
    higher = tl.maximum(peak, sink)
    shrink = tl.exp2(peak - higher)
    return acc * shrink[:, None], higher, total * shrink + tl.exp2(sink - higher)


@triton.jit(do_not_specialize=["sizes", "window", "tiles"])
def forward_kernel(
    out, lse, query, key, value, prefix_key, prefix_value, bank, starts, padding, mask, sinks, sizes, scoring, window,
    tiles, GROUP: tl.constexpr, CAUSAL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DTYPE: tl.constexpr,
    PREFIX: tl.constexpr, FROM_STATE: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head."""
    batch, kv_head, head, tile = tile_of_program(tiles, sizes, GROUP)
    sequence, start, queries, length, first = locate(tile, batch, starts, sizes, ROWS)
    if first >= queries:
        return
    last = tl.minimum(first + ROWS, queries)
    i = first + tl.arange(0, ROWS)
    exists = i < queries
    q = load_tile(at(query, batch, head, start), i, query.row, exists, DIM, WIDTH, DTYPE)
    out_at, lse_at = at(out, batch, head, start), at(lse, batch, head, start) + i.to(tl.int64) * lse.row

    if FROM_STATE:
        acc = load_tile(out_at, i, out.row, exists, VALUE_DIM, VALUE_WIDTH, tl.float32)
        peak = tl.load(lse_at, mask=exists, other=-INFINITY)
        total = tl.where(tl.abs(peak) == INFINITY, 0.0, 1.0)  # some kernels write +infinity where nothing is seen
        peak = tl.where(total > 0, peak * LOG2E, LOWEST)
    else:
        acc = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
        peak = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
    if sinks is not None:
        acc, peak, total = absorb_sink(acc, peak, total, tl.load(sinks + head))

    if PREFIX:
        entry, virtual = prefix_of(sequence, bank, sizes)
        acc, peak, total = absorb_prefix(
            acc, peak, total, q, i, prefix_key, prefix_value, entry, kv_head, entry * 0, virtual, scoring,
            DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, KEYS, DTYPE,
        )  # fmt: skip
    if not FROM_STATE:
        shift = length - queries
        mask_from = mask_of(mask, batch, head, start, queries, length)
        padded = padding_of(padding, batch, start)
        keys = (at(key, batch, kv_head, start), key.row, at(value, batch, kv_head, start), value.row)
        begin, end, whole_begin, whole, left, edges = keys_seen(first, last, shift, length, window, KEYS, CAUSAL)
        acc, peak, total = absorb(
            acc, peak, total, q, i, keys, padded, whole_begin, whole, whole, left, end, mask_from, scoring, shift,
            window,
            DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, KEYS, DTYPE, CAUSAL, False,
        )  # fmt: skip
        acc, peak, total = absorb(
            acc, peak, total, q, i, keys, padded, begin, edges, whole, left, end, mask_from, scoring, shift,
            window,
            DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, KEYS, DTYPE, CAUSAL, True,
        )  # fmt: skip

    sees = total > 0
    acc = acc / tl.where(sees, total, 1.0)[:, None]
    store_tile(out_at, i, out.row, exists, acc, VALUE_DIM, VALUE_WIDTH)
    tl.store(lse_at, tl.where(sees, (peak + tl.log2(tl.where(sees, total, 1.0))) * LN2, -INFINITY), mask=exists)


def forward(p: AttentionProblem, out: Tensor, lse: Tensor, *, from_state: bool = False) -> None:
    """Writes ``out`` [B, H, T, Dv] and ``lse`` [B, H, T] (float32, natural log; -inf where a query sees nothing).

    ``from_state``: ``out`` and ``lse`` already hold attention over the sequence alone (of any kernel; rows that see
    nothing may have an lse of either infinity); the prefix, and the sinks if there are any, are absorbed into them.
    """
    blocks = launch.blocks_for("from_state" if from_state else "forward", p)
    tiles = launch.tiles(p, p.queries, blocks.rows)
    launch.launch(
        forward_kernel, tiles * p.heads * p.batch, blocks, p.query,
        out=launch.view(out), lse=launch.view(lse), sinks=launch.flat(p.sinks), tiles=tiles,
        PREFIX=p.virtual_tokens > 0, FROM_STATE=from_state, **launch.arguments(p), **launch.constants(p, blocks),
    )  # fmt: skip
