"""The gradients of the sequence's keys and values: one program a tile of keys, so that nothing is added atomically.

A program sums over the query heads of the group and the queries that see its keys.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...problem import AttentionProblem
from . import launch
from .delta import Upstream, delta_of
from .grad_tile import add_queries
from .ranges import queries_seeing, tile_count, tile_indices
from .scores import ScoreMod, mask_of, padding_of
from .sequences import locate
from .tiles import address, head_of, load_log_sum_exp, load_tile, store_tile


class Queries(NamedTuple):
    """What each tile of queries needs: where the queries lie, which of them, and how they are scored.

    Attributes:
        query: One head's [T, D], `Strided`.
        batch: Its batch row, and
        head: its number, and
        start: where its sequence starts, to find in
        upstream: what comes into the backward, a `delta.Upstream`.
        tiles: The queries that see any of the keys, `ranges.Tiles`.
        score_mod: A `scores.ScoreMod`.
    """

    query: Any
    batch: Any
    head: Any
    start: Any
    upstream: Any
    tiles: Any
    score_mod: Any


@triton.jit
def add_all_queries(
    dk, dv, k, v, j, queries, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Adds what all `queries` give to `dk` = dK / scale and `dv` of keys `j`: edges, then whole tiles.

    `dk` and `k` are [BLOCK_N, BLOCK_D], `dv` and `v` [BLOCK_N, BLOCK_DV].
    """
    for EDGE in tl.static_range(1, -1, -1):
        for n in range(0, tile_count(queries.tiles, EDGE)):
            i = tile_indices(queries.tiles, n, BLOCK_M, EDGE)  # [BLOCK_M]
            exists = i < queries.tiles.end
            keep = None
            if EDGE:
                keep = exists
            q = load_tile(queries.query, i, keep, HEAD_DIM, k.shape[1], k.dtype)  # [BLOCK_M, BLOCK_D]
            do_head = head_of(queries.upstream.grad_out, queries.batch, queries.head, queries.start)
            do = load_tile(do_head, i, keep, VALUE_DIM, v.shape[1], k.dtype)  # [BLOCK_M, BLOCK_DV]
            at = queries.start + i
            delta = delta_of(queries.upstream, queries.batch, queries.head, at, exists, do, VALUE_DIM)  # [BLOCK_M]
            lse_head = head_of(queries.upstream.lse, queries.batch, queries.head, queries.start)
            lse = load_log_sum_exp(lse_head, i, exists)  # [BLOCK_M]
            dk, dv, _ds = add_queries(dk, dv, k, v, q, do, lse, delta, i, j, None, queries.score_mod, CAUSAL, EDGE)
    return dk, dv


@triton.jit
def write_grad_keys(
    batch, kv_head, sequence, first, grad_key, grad_value, upstream, query, key, value, padding, mask, scoring, window,
    scale, GROUP: tl.constexpr, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of the BLOCK_N keys and values from `first` on, of one key/value head."""
    start = sequence.start
    last = tl.minimum(first + BLOCK_N, sequence.keys)
    shift = sequence.keys - sequence.queries
    j = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    exists = j < sequence.keys
    keep = exists
    padded = padding_of(padding, batch, start)
    if padded is not None:
        keep = tl.load(address(padded, j), mask=exists, other=0) != 0
    # Keys beyond the sequence, and padding, are loaded as zeros: dK and dV are wrong there, and replaced at the end.
    k = load_tile(head_of(key, batch, kv_head, start), j, keep, HEAD_DIM, BLOCK_D, DTYPE)  # [BLOCK_N, BLOCK_D]
    v = load_tile(head_of(value, batch, kv_head, start), j, keep, VALUE_DIM, BLOCK_DV, DTYPE)  # [BLOCK_N, BLOCK_DV]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    seeing = queries_seeing(first, last, shift, sequence.queries, window, BLOCK_M, CAUSAL)
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        score_mod = ScoreMod(scoring, mask_of(mask, batch, head, sequence), shift, window)
        queries = Queries(
            query=head_of(query, batch, head, start),
            batch=batch,
            head=head,
            start=start,
            upstream=upstream,
            tiles=seeing,
            score_mod=score_mod,
        )
        dk, dv = add_all_queries(dk, dv, k, v, j, queries, HEAD_DIM, VALUE_DIM, BLOCK_M, CAUSAL)
    dk = tl.where(keep[:, None], dk * scale, 0.0)
    dv = tl.where(keep[:, None], dv, 0.0)
    store_tile(head_of(grad_key, batch, kv_head, start), j, exists, dk, HEAD_DIM)
    store_tile(head_of(grad_value, batch, kv_head, start), j, exists, dv, VALUE_DIM)


@triton.jit(do_not_specialize=["sizes", "window", "tiles", "scale"])
def grad_keys_kernel(
    grad_key, grad_value, grad_out, lse, delta, query, key, value, cu_seqlens, padding, mask, sizes, scoring, window,
    tiles, scale, GROUP: tl.constexpr, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one key/value head. Early tiles come first: the most queries see them."""
    program = tl.program_id(0)
    tile, kv_head = program % tiles, program // tiles % sizes.kv_heads
    batch = program // (tiles * sizes.kv_heads)
    sequence, first = locate(tile, batch, cu_seqlens, sizes, BLOCK_N)
    if first >= sequence.keys:
        return
    upstream = Upstream(grad_out, lse, delta, out=None, grad_lse=None)
    write_grad_keys(
        batch, kv_head, sequence, first, grad_key, grad_value, upstream, query, key, value, padding, mask, scoring,
        window, scale, GROUP, CAUSAL, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, BLOCK_M, BLOCK_N, DTYPE,
    )  # fmt: skip


def launch_grad_keys(
    p: AttentionProblem, grad_out: Tensor, lse: Tensor, delta: Tensor, grad_key: Tensor, grad_value: Tensor
) -> None:  # fmt: skip
    """Writes `grad_key` [B, Hkv, S, D] and `grad_value` [B, Hkv, S, Dv].

    From `grad_out` [B, H, T, Dv], the log-sum-exp of prefix and sequence together, and `delta.compute_delta`'s
    (both [B, H, T]).
    """
    blocks = launch.blocks_for("grad_keys", p)
    tiles = launch.tile_count(p, p.keys, blocks.block_n)
    arguments = launch.arguments(p)
    for unused in ("prefix_key", "prefix_value", "bank"):
        del arguments[unused]
    launch.launch(
        grad_keys_kernel, tiles * p.kv_heads * p.batch, blocks, p.query,
        grad_key=launch.view(grad_key), grad_value=launch.view(grad_value), grad_out=launch.view(grad_out),
        lse=launch.view(lse), delta=launch.view(delta), tiles=tiles, scale=p.scale,
        **arguments, **launch.constants(p, blocks),
    )  # fmt: skip
