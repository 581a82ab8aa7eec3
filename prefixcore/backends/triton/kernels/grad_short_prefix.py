"""What a prefix of few tokens adds to the backward, in one pass over the queries: its dQ, dK and dV, and delta.

Where the prefix is short, the merged path's backward is bound by memory, not by arithmetic: the query, output and two
gradients of each token are far more bytes than its few products take time. `grad_query` and `grad_prefix` would each
read them, after `delta`; here they are read once. One tile holds all virtual tokens, so that their gradients stay in
registers while a program walks over its queries. As in `grad_prefix`, a second kernel adds the programs' partial sums
in a fixed order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import AttentionProblem
from . import launch
from .grad_prefix import TILES_PER_SPLIT, reduce_partials
from .grad_tile import add_queries
from .scores import ScoreMod
from .sequences import prefix_length
from .tiles import Strided, dot, head_of, load_log_sum_exp, load_tile, store_tile

LONGEST = 64
"""Virtual tokens. The gradients of more do not fit into registers beside a tile of queries."""


@triton.jit(do_not_specialize=["sizes", "tiles", "share", "batch", "scale"])
def grad_short_prefix_kernel(
    grad_query, grad_key, grad_value, grad_out, out, lse, query, prefix_key, prefix_value, bank, sizes, scoring,
    tiles, share, batch, scale, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: `share` tiles of queries of one key/value head; the tiles of a group's heads are neighbours."""
    program = tl.program_id(0)
    kv_head, split = program % sizes.kv_heads, program // sizes.kv_heads
    origin = kv_head * 0
    j = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    counts = j < prefix_length(origin, bank, sizes)
    k_head = head_of(prefix_key, origin, kv_head, origin)
    k = load_tile(k_head, j, counts, HEAD_DIM, BLOCK_D, DTYPE)  # [BLOCK_N, BLOCK_D]
    v_head = head_of(prefix_value, origin, kv_head, origin)
    v = load_tile(v_head, j, counts, HEAD_DIM, BLOCK_D, DTYPE)  # [BLOCK_N, BLOCK_D]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    score_mod = ScoreMod(scoring, mask=None, shift=0, window=None)

    begin = split * share
    # By its own choice Triton prefetches only what feeds a product: `num_stages` here is for the other loads, too.
    for n in tl.range(begin, tl.minimum(begin + share, batch * tiles * GROUP), num_stages=STAGES):
        head, b = kv_head * GROUP + n % GROUP, n // (GROUP * tiles)
        i = n // GROUP % tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        exists = i < sizes.queries
        q = load_tile(head_of(query, b, head, origin), i, exists, HEAD_DIM, BLOCK_D, DTYPE)  # [BLOCK_M, BLOCK_D]
        do = load_tile(head_of(grad_out, b, head, origin), i, exists, HEAD_DIM, BLOCK_D, DTYPE)  # [BLOCK_M, BLOCK_D]
        o = load_tile(head_of(out, b, head, origin), i, exists, HEAD_DIM, BLOCK_D, DTYPE)  # [BLOCK_M, BLOCK_D]
        dq_at = head_of(grad_query, b, head, origin)
        dq = load_tile(dq_at, i, exists, HEAD_DIM, BLOCK_D, DTYPE)  # [BLOCK_M, BLOCK_D]
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # [BLOCK_M]
        lse_i = load_log_sum_exp(head_of(lse, b, head, origin), i, exists)  # [BLOCK_M]
        dk, dv, ds = add_queries(
            dk, dv, k, v, q, do, lse_i, delta, i, j, counts[:, None], score_mod, CAUSAL=False, EDGE=False
        )  # ds: [BLOCK_N, BLOCK_M]
        dq = dq.to(tl.float32) + dot(tl.trans(ds), k, tl.zeros([BLOCK_M, BLOCK_D], tl.float32)) * scale
        store_tile(dq_at, i, exists, dq, HEAD_DIM)
    dk = tl.where(counts[:, None], dk * scale, 0.0)
    dv = tl.where(counts[:, None], dv, 0.0)
    place = (split * sizes.kv_heads + kv_head).to(tl.int64) * sizes.virtual_tokens * HEAD_DIM
    exists = j < sizes.virtual_tokens
    store_tile(Strided(grad_key + place, HEAD_DIM), j, exists, dk, HEAD_DIM)
    store_tile(Strided(grad_value + place, HEAD_DIM), j, exists, dv, HEAD_DIM)


def fits(p: AttentionProblem) -> bool:
    """Whether one tile holds the prefix, and every query sees it."""
    widest = launch.padded(max(p.head_dim, p.value_dim))
    return 0 < p.virtual_tokens <= LONGEST and widest <= 128 and p.head_dim == p.value_dim and p.prefix_index is None


def launch_grad_short_prefix(
    p: AttentionProblem, grad_out: Tensor, out: Tensor, lse: Tensor, grad_query: Tensor
) -> tuple[Tensor, Tensor]:
    """Adds the prefix's part to `grad_query` [B, H, T, D]; returns its own gradients, [N, Hkv, P, D] in float32.

    From `grad_out` and `out` [B, H, T, D] and `lse` [B, H, T], of prefix and sequence together. Only for a problem
    that `fits`.
    """
    blocks = launch.blocks_for("grad_short_prefix", p)
    blocks = blocks._replace(block_n=launch.padded(p.virtual_tokens))
    tiles = triton.cdiv(p.queries, blocks.block_m)
    in_all = tiles * p.batch * p.group
    splits = max(1, min(launch.PROGRAMS // p.kv_heads, in_all // TILES_PER_SPLIT))
    share = triton.cdiv(in_all, splits)
    splits = triton.cdiv(in_all, share)
    grads = [
        launch.empty(splits, 1, p.kv_heads, p.virtual_tokens, p.head_dim, like=p.query, dtype=torch.float32)
        for _ in range(2)
    ]
    arguments, constants = launch.arguments(p), launch.constants(p, blocks)
    for unused in ("key", "value", "cu_seqlens", "padding", "mask", "window"):
        del arguments[unused]
    for unused in ("CAUSAL", "VALUE_DIM", "BLOCK_DV"):
        del constants[unused]
    launch.launch(
        grad_short_prefix_kernel, splits * p.kv_heads, blocks, p.query,
        grad_query=launch.view(grad_query), grad_key=grads[0], grad_value=grads[1], grad_out=launch.view(grad_out),
        out=launch.view(out), lse=launch.view(lse), tiles=tiles, share=share, batch=p.batch, scale=p.scale,
        STAGES=blocks.stages, **arguments, **constants,
    )  # fmt: skip
    return reduce_partials(grads[0]), reduce_partials(grads[1])
