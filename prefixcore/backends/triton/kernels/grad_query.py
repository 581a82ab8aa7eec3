"""The gradient of the queries: over the same keys as the forward, with probabilities from its log-sum-exp.

With L a query's log-sum-exp and delta its sum of dO * O (Dao et al., arXiv:2205.14135, appendix B.2):
    p = 2^(scores - L),  dS = p (dO V^T - delta),  dQ = scale dS K.
Prefix and sequence add up, each depending on the other through L and delta alone: if another kernel has written the
sequence's part, the prefix's is added to it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from torch import Tensor

from ...problem import AttentionProblem
from . import launch
from .delta import Upstream, delta_of
from .online_softmax import Keys
from .ranges import in_tiles, keys_seen, tile_count, tile_indices
from .scores import ScoreMod, exists_unpadded, mask_of, padding_of, score
from .sequences import locate, prefix_of, tile_of_program
from .tiles import dot, head_of, load_log_sum_exp, load_tile, store_tile


@triton.jit
def add_keys(
    dq, q, do, lse, delta, i, keys, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Adds what all `keys` give to `dq` = dQ / scale [BLOCK_M, BLOCK_D] of queries `i`: whole tiles, then edges.

    `q` is [BLOCK_M, BLOCK_D], `do` [BLOCK_M, BLOCK_DV], `lse` and `delta` [BLOCK_M].
    """
    for EDGE in tl.static_range(2):
        for n in range(0, tile_count(keys.tiles, EDGE)):
            j = tile_indices(keys.tiles, n, BLOCK_N, EDGE)  # [BLOCK_N]
            keep = exists_unpadded(j, keys.tiles.end, keys.padding, EDGE)  # [BLOCK_N] or None
            k = load_tile(keys.key, j, keep, HEAD_DIM, q.shape[1], q.dtype)  # [BLOCK_N, BLOCK_D]
            v = load_tile(keys.value, j, keep, VALUE_DIM, do.shape[1], q.dtype)  # [BLOCK_N, BLOCK_DV]
            zeros = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
            if keep is not None:
                keep = keep[None, :]
            scores, slope = score(
                dot(q, tl.trans(k), zeros), i[:, None], j[None, :], keep, keys.score_mod, CAUSAL, EDGE
            )  # [BLOCK_M, BLOCK_N]
            p = tl.exp2(scores - lse[:, None])  # [BLOCK_M, BLOCK_N]
            ds = p * (dot(do, tl.trans(v), zeros) - delta[:, None])  # [BLOCK_M, BLOCK_N]
            if keys.score_mod.scoring.cap is not None:
                ds *= slope
            dq = dot(ds.to(q.dtype), k, dq)
    return dq


@triton.jit
def write_grad_query(
    batch, kv_head, head, sequence, first, grad_query, upstream, query, key, value, prefix_key, prefix_value, bank,
    padding, mask, sizes, scoring, window, scale, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr, PREFIX: tl.constexpr, PREFIX_ONLY: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the BLOCK_M queries from `first` on, of one head. `upstream` is a `delta.Upstream`."""
    start = sequence.start
    last = tl.minimum(first + BLOCK_M, sequence.queries)
    i = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    exists = i < sequence.queries
    q = load_tile(head_of(query, batch, head, start), i, exists, HEAD_DIM, BLOCK_D, DTYPE)  # [BLOCK_M, BLOCK_D]
    do_head = head_of(upstream.grad_out, batch, head, start)
    do = load_tile(do_head, i, exists, VALUE_DIM, BLOCK_DV, DTYPE)  # [BLOCK_M, BLOCK_DV]
    delta_i = delta_of(upstream, batch, head, start + i, exists, do, VALUE_DIM)  # [BLOCK_M]
    lse_i = load_log_sum_exp(head_of(upstream.lse, batch, head, start), i, exists)  # [BLOCK_M]
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if PREFIX:
        entry, length = prefix_of(sequence.number, bank, sizes)
        keys = Keys(
            padding=None,
            key=head_of(prefix_key, entry, kv_head, entry * 0),
            value=head_of(prefix_value, entry, kv_head, entry * 0),
            tiles=in_tiles(entry * 0, entry * 0, length, length, BLOCK_N),
            score_mod=ScoreMod(scoring, mask=None, shift=0, window=None),
        )
        dq = add_keys(dq, q, do, lse_i, delta_i, i, keys, HEAD_DIM, VALUE_DIM, BLOCK_N, CAUSAL=False)
    if not PREFIX_ONLY:
        shift = sequence.keys - sequence.queries
        score_mod = ScoreMod(scoring, mask_of(mask, batch, head, sequence), shift, window)
        keys = Keys(
            padding=padding_of(padding, batch, start),
            key=head_of(key, batch, kv_head, start),
            value=head_of(value, batch, kv_head, start),
            tiles=keys_seen(first, last, shift, sequence.keys, window, BLOCK_N, CAUSAL),
            score_mod=score_mod,
        )
        dq = add_keys(dq, q, do, lse_i, delta_i, i, keys, HEAD_DIM, VALUE_DIM, BLOCK_N, CAUSAL)

    dq *= scale
    to = head_of(grad_query, batch, head, start)
    if PREFIX_ONLY:
        dq += load_tile(to, i, exists, HEAD_DIM, BLOCK_D, tl.float32)
    store_tile(to, i, exists, dq, HEAD_DIM)


@triton.jit(do_not_specialize=["sizes", "window", "tiles", "scale"])
def grad_query_kernel(
    grad_query, grad_out, lse, delta, query, key, value, prefix_key, prefix_value, bank, cu_seqlens, padding, mask,
    sizes, scoring, window, tiles, scale, GROUP: tl.constexpr, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, DTYPE: tl.constexpr, PREFIX: tl.constexpr, PREFIX_ONLY: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head, as in the forward."""
    batch, kv_head, head, tile = tile_of_program(tl.program_id(0), tiles, sizes, GROUP)
    sequence, first = locate(tile, batch, cu_seqlens, sizes, BLOCK_M)
    if first >= sequence.queries:
        return
    upstream = Upstream(grad_out, lse, delta, out=None, grad_lse=None)
    write_grad_query(
        batch, kv_head, head, sequence, first, grad_query, upstream, query, key, value, prefix_key, prefix_value, bank,
        padding, mask, sizes, scoring, window, scale, CAUSAL, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, BLOCK_M, BLOCK_N,
        DTYPE, PREFIX, PREFIX_ONLY,
    )  # fmt: skip


def launch_grad_query(
    p: AttentionProblem, grad_out: Tensor, lse: Tensor, delta: Tensor, grad_query: Tensor, *, prefix_only: bool = False
) -> None:
    """Writes `grad_query` [B, H, T, D].

    Args:
        p: The arguments of the op.
        grad_out: [B, H, T, Dv].
        lse: Of prefix and sequence together, [B, H, T].
        delta: Of `delta.compute_delta`, [B, H, T].
        grad_query: The gradient.
        prefix_only: `grad_query` holds the sequence's part: the prefix's is added to it.
    """
    blocks = launch.blocks_for("grad_query", p)
    tiles = launch.tile_count(p, p.queries, blocks.block_m)
    launch.launch(
        grad_query_kernel, tiles * p.heads * p.batch, blocks, p.query,
        grad_query=launch.view(grad_query), grad_out=launch.view(grad_out), lse=launch.view(lse),
        delta=launch.view(delta), tiles=tiles, scale=p.scale, PREFIX=p.virtual_tokens > 0, PREFIX_ONLY=prefix_only,
        **launch.arguments(p), **launch.constants(p, blocks),
    )  # fmt: skip
