"""The gradient of the queries: the forward's walk over the keys, with the probabilities already known.

With L the log-sum-exp and delta of a row (Dao et al., arXiv:2205.14135, appendix B.2):
    p = 2^(scores - L),  dS = p (dO V^T - delta),  dQ = scale dS K.
Prefix and sequence add up, each knowing of the other only through L and delta: if another kernel has written the
sequence's part, the prefix's is added to it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from torch import Tensor

from ...problem import AttentionProblem
from . import launch
from .tiles import (
    at,
    dot,
    finish_scores,
    in_tiles,
    kept,
    keys_seen,
    load_statistics,
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
def gather(
    dq, q, do, lse, delta, i, keys, padding, begin, count, whole, left, end, mask, scoring, shift, window,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    KEYS: tl.constexpr, DTYPE: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds what ``count`` tiles of keys give to dQ / scale."""
    key, key_row, value, value_row = keys
    for n in range(0, count):
        j = tile_start(n, begin, whole, left, KEYS, EDGE) + tl.arange(0, KEYS)
        keep = kept(j, end, padding, EDGE)
        k = load_tile(key, j, key_row, keep, DIM, WIDTH, DTYPE)
        v = load_tile(value, j, value_row, keep, VALUE_DIM, VALUE_WIDTH, DTYPE)
        zeros = tl.zeros([q.shape[0], KEYS], tl.float32)
        scores = dot(q, tl.trans(k), zeros)
        if keep is not None:
            keep = keep[None, :]
        scores, slope = finish_scores(scores, i[:, None], j[None, :], keep, mask, scoring, shift, window, CAUSAL, EDGE)
        p = tl.exp2(scores - lse[:, None])
        ds = p * (dot(do, tl.trans(v), zeros) - delta[:, None])
        if scoring.cap is not None:
            ds *= slope
        dq = dot(ds.to(DTYPE), k, dq)
    return dq


@triton.jit(do_not_specialize=["sizes", "window", "tiles", "scale"])
def grad_query_kernel(
    grad_query, grad_out, lse, delta, query, key, value, prefix_key, prefix_value, bank, starts, padding, mask, sizes,
    scoring, window, tiles, scale, GROUP: tl.constexpr, CAUSAL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DTYPE: tl.constexpr,
    PREFIX: tl.constexpr, PREFIX_ONLY: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head, as in the forward."""
    batch, kv_head, head, tile = tile_of_program(tiles, sizes, GROUP)
    sequence, start, queries, length, first = locate(tile, batch, starts, sizes, ROWS)
    if first >= queries:
        return
    last = tl.minimum(first + ROWS, queries)
    i = first + tl.arange(0, ROWS)
    exists = i < queries
    q = load_tile(at(query, batch, head, start), i, query.row, exists, DIM, WIDTH, DTYPE)
    do = load_tile(at(grad_out, batch, head, start), i, grad_out.row, exists, VALUE_DIM, VALUE_WIDTH, DTYPE)
    lse_i, delta_i = load_statistics(at(lse, batch, head, start), i, lse.row,
                                     at(delta, batch, head, start), i, delta.row, exists)  # fmt: skip
    dq = tl.zeros([ROWS, WIDTH], tl.float32)

    if PREFIX:
        entry, virtual = prefix_of(sequence, bank, sizes)
        origin = entry * 0
        keys = (at(prefix_key, entry, kv_head, origin), prefix_key.row,
                at(prefix_value, entry, kv_head, origin), prefix_value.row)  # fmt: skip
        begin, whole, left, edges = in_tiles(origin, origin, virtual, virtual, KEYS)
        dq = gather(
            dq, q, do, lse_i, delta_i, i, keys, None, begin, whole, whole, left, virtual, None, scoring, 0, None,
            DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, KEYS, DTYPE, False, False,
        )  # fmt: skip
        dq = gather(
            dq, q, do, lse_i, delta_i, i, keys, None, begin, edges, whole, left, virtual, None, scoring, 0, None,
            DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, KEYS, DTYPE, False, True,
        )  # fmt: skip
    if not PREFIX_ONLY:
        shift = length - queries
        mask_from = mask_of(mask, batch, head, start, queries, length)
        padded = padding_of(padding, batch, start)
        keys = (at(key, batch, kv_head, start), key.row, at(value, batch, kv_head, start), value.row)
        begin, end, whole_begin, whole, left, edges = keys_seen(first, last, shift, length, window, KEYS, CAUSAL)
        dq = gather(
            dq, q, do, lse_i, delta_i, i, keys, padded, whole_begin, whole, whole, left, end, mask_from, scoring, shift,
            window,
            DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, KEYS, DTYPE, CAUSAL, False,
        )  # fmt: skip
        dq = gather(
            dq, q, do, lse_i, delta_i, i, keys, padded, begin, edges, whole, left, end, mask_from, scoring, shift,
            window,
            DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, KEYS, DTYPE, CAUSAL, True,
        )  # fmt: skip

    dq *= scale
    to = at(grad_query, batch, head, start)
    if PREFIX_ONLY:
        dq += load_tile(to, i, grad_query.row, exists, DIM, WIDTH, tl.float32)
    store_tile(to, i, grad_query.row, exists, dq, DIM, WIDTH)


def grad_query(
    p: AttentionProblem, grad_out: Tensor, lse: Tensor, delta: Tensor, grad_query: Tensor, *, prefix_only: bool = False
) -> None:
    """Writes ``grad_query`` [B, H, T, D] from ``grad_out`` [B, H, T, Dv] and the merged ``lse`` and ``delta``
    [B, H, T]; ``prefix_only`` adds the prefix's part to what is there instead."""
    blocks = launch.blocks_for("grad_query", p)
    tiles = launch.tiles(p, p.queries, blocks.rows)
    launch.launch(
        grad_query_kernel, tiles * p.heads * p.batch, blocks, p.query,
        grad_query=launch.view(grad_query), grad_out=launch.view(grad_out), lse=launch.view(lse),
        delta=launch.view(delta), tiles=tiles, scale=p.scale, PREFIX=p.virtual_tokens > 0, PREFIX_ONLY=prefix_only,
        **launch.arguments(p), **launch.constants(p, blocks),
    )  # fmt: skip
