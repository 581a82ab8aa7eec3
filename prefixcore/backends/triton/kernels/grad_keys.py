"""The gradients of the sequence's keys and values: one program a tile of keys, so nothing is added atomically.

With p and dS as in :mod:`.grad_query`, transposed (Dao et al., arXiv:2205.14135, appendix B.2):
    dV = p^T dO,  dK = scale dS^T Q,  summed over the query heads of the group and the queries that see the keys.
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
    load_statistics,
    load_tile,
    locate,
    mask_of,
    padding_of,
    queries_seeing,
    store_tile,
    tile_start,
)  # fmt: skip


@triton.jit
def collect(
    dk, dv, k, v, q, do, lse, delta, i, j, mask, scoring, shift, window,
    DTYPE: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds what one tile of rows gives to dK / scale and dV of a tile of keys."""
    zeros = tl.zeros([k.shape[0], q.shape[0]], tl.float32)
    scores = dot(k, tl.trans(q), zeros)
    scores, slope = finish_scores(scores, i[None, :], j[:, None], None, mask, scoring, shift, window, CAUSAL, EDGE)
    p = tl.exp2(scores - lse[None, :])
    dv = dot(p.to(DTYPE), do, dv)
    ds = p * (dot(v, tl.trans(do), zeros) - delta[None, :])
    if scoring.cap is not None:
        ds *= slope
    return dot(ds.to(DTYPE), q, dk), dv


@triton.jit
def collect_tiles(
    dk, dv, k, v, j, rows, begin, count, whole, left, end, mask, scoring, shift, window,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, DTYPE: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds what ``count`` tiles of one head's queries give; ``rows`` says where they lie."""
    query, query_row, grad_out, grad_out_row, lse, lse_row, delta, delta_row = rows
    for n in range(0, count):
        i = tile_start(n, begin, whole, left, ROWS, EDGE) + tl.arange(0, ROWS)
        exists = i < end
        keep = None
        if EDGE:
            keep = exists
        q = load_tile(query, i, query_row, keep, DIM, WIDTH, DTYPE)
        do = load_tile(grad_out, i, grad_out_row, keep, VALUE_DIM, VALUE_WIDTH, DTYPE)
        lse_i, delta_i = load_statistics(lse, i, lse_row, delta, i, delta_row, exists)
        dk, dv = collect(dk, dv, k, v, q, do, lse_i, delta_i, i, j, mask, scoring, shift, window, DTYPE, CAUSAL, EDGE)
    return dk, dv


@triton.jit(do_not_specialize=["sizes", "window", "tiles", "scale"])
def grad_keys_kernel(
    grad_key, grad_value, grad_out, lse, delta, query, key, value, starts, padding, mask, sizes, scoring, window,
    tiles, scale, GROUP: tl.constexpr, CAUSAL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program: KEYS keys of one key/value head. Early tiles come first: the most queries see them."""
    program = tl.program_id(0)
    tile, kv_head = program % tiles, program // tiles % sizes.kv_heads
    batch = program // (tiles * sizes.kv_heads)
    _sequence, start, queries, length, first = locate(tile, batch, starts, sizes, KEYS)
    if first >= length:
        return
    last = tl.minimum(first + KEYS, length)
    shift = length - queries
    j = first + tl.arange(0, KEYS)
    exists = j < length
    keep = exists
    padded = padding_of(padding, batch, start)
    if padded is not None:
        keep = tl.load(padded[0] + j.to(tl.int64) * padded[1], mask=exists, other=0) != 0
    # Keys beyond the sequence, or padding, are zeros here: their rows of dK and dV come out wrong and are not used.
    k = load_tile(at(key, batch, kv_head, start), j, key.row, keep, DIM, WIDTH, DTYPE)
    v = load_tile(at(value, batch, kv_head, start), j, value.row, keep, VALUE_DIM, VALUE_WIDTH, DTYPE)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, VALUE_WIDTH], tl.float32)
    begin, end, whole_begin, whole, left, edges = queries_seeing(first, last, shift, queries, window, ROWS, CAUSAL)
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        mask_from = mask_of(mask, batch, head, start, queries, length)
        rows = (at(query, batch, head, start), query.row, at(grad_out, batch, head, start), grad_out.row,
                at(lse, batch, head, start), lse.row, at(delta, batch, head, start), delta.row)  # fmt: skip
        dk, dv = collect_tiles(
            dk, dv, k, v, j, rows, begin, edges, whole, left, end, mask_from, scoring, shift, window,
            DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, ROWS, DTYPE, CAUSAL, True,
        )  # fmt: skip
        dk, dv = collect_tiles(
            dk, dv, k, v, j, rows, whole_begin, whole, whole, left, end, mask_from, scoring, shift, window,
            DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, ROWS, DTYPE, CAUSAL, False,
        )  # fmt: skip
    dk = tl.where(keep[:, None], dk * scale, 0.0)
    dv = tl.where(keep[:, None], dv, 0.0)
    store_tile(at(grad_key, batch, kv_head, start), j, grad_key.row, exists, dk, DIM, WIDTH)
    store_tile(at(grad_value, batch, kv_head, start), j, grad_value.row, exists, dv, VALUE_DIM, VALUE_WIDTH)


def grad_keys(
    p: AttentionProblem, grad_out: Tensor, lse: Tensor, delta: Tensor, grad_key: Tensor, grad_value: Tensor
) -> None:  # fmt: skip
    """Writes ``grad_key`` [B, Hkv, S, D] and ``grad_value`` [B, Hkv, S, Dv] from ``grad_out`` [B, H, T, Dv] and the
    merged ``lse`` and ``delta`` [B, H, T]."""
    blocks = launch.blocks_for("grad_keys", p)
    tiles = launch.tiles(p, p.keys, blocks.keys)
    arguments = launch.arguments(p)
    for unused in ("prefix_key", "prefix_value", "bank"):
        del arguments[unused]
    launch.launch(
        grad_keys_kernel, tiles * p.kv_heads * p.batch, blocks, p.query,
        grad_key=launch.view(grad_key), grad_value=launch.view(grad_value), grad_out=launch.view(grad_out),
        lse=launch.view(lse), delta=launch.view(delta), tiles=tiles, scale=p.scale,
        **arguments, **launch.constants(p, blocks),
    )  # fmt: skip
