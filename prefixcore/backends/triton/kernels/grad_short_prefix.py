"""What a prefix of few tokens adds to the backward, in one pass over the rows: dQ, dK and dV of the prefix, and delta.

The merged path's backward is bound by memory, not by arithmetic, where the prefix is short: each row's query, output
and two gradients are far more bytes than its few products. :mod:`.grad_query` and :mod:`.grad_prefix` would each read
them, after :mod:`.delta`; here they are read once. One tile holds all virtual tokens, so that their gradients stay in
registers while a program walks over its rows. As in :mod:`.grad_prefix` the programs' partial sums are added by a
second kernel in a fixed order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import AttentionProblem
from . import launch
from .grad_prefix import TILES_A_SPLIT, reduce_partials
from .tiles import at, dot, finish_scores, length_of, load_log_sum_exp, load_tile, store_tile

LONGEST = 64
"""Virtual tokens. The gradients of more do not fit into registers beside a tile of rows."""


@triton.jit(do_not_specialize=["sizes", "tiles", "share", "batch", "scale"])
def grad_short_prefix_kernel(
    grad_query, grad_key, grad_value, grad_out, out, lse, query, prefix_key, prefix_value, bank, sizes, scoring,
    tiles, share, batch, scale, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DTYPE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: ``share`` of the tiles of rows of one key/value head; the tiles of a group stand side by side."""
    program = tl.program_id(0)
    kv_head, split = program % sizes.kv_heads, program // sizes.kv_heads
    origin = kv_head * 0
    j = tl.arange(0, KEYS)
    counts = j < length_of(origin, bank, sizes)
    k = load_tile(at(prefix_key, origin, kv_head, origin), j, prefix_key.row, counts, DIM, WIDTH, DTYPE)
    v = load_tile(at(prefix_value, origin, kv_head, origin), j, prefix_value.row, counts, DIM, WIDTH, DTYPE)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)
    zeros = tl.zeros([KEYS, ROWS], tl.float32)

    begin = split * share
    # Its stages are named here: otherwise loads that feed no product would not be asked for ahead.
    for n in tl.range(begin, tl.minimum(begin + share, batch * tiles * GROUP), num_stages=STAGES):
        head, b = kv_head * GROUP + n % GROUP, n // (GROUP * tiles)
        i = n // GROUP % tiles * ROWS + tl.arange(0, ROWS)
        exists = i < sizes.queries
        q = load_tile(at(query, b, head, origin), i, query.row, exists, DIM, WIDTH, DTYPE)
        do = load_tile(at(grad_out, b, head, origin), i, grad_out.row, exists, DIM, WIDTH, DTYPE)
        o = load_tile(at(out, b, head, origin), i, out.row, exists, DIM, WIDTH, DTYPE)
        dq_at = at(grad_query, b, head, origin)
        dq = load_tile(dq_at, i, grad_query.row, exists, DIM, WIDTH, DTYPE)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        lse_i = load_log_sum_exp(at(lse, b, head, origin), i, lse.row, exists)
        scores = dot(k, tl.trans(q), zeros)
        scores, _slope = finish_scores(
            scores, i[None, :], j[:, None], counts[:, None], None, scoring, 0, None, False, False
        )
        p = tl.exp2(scores - lse_i[None, :])
        dv = dot(p.to(DTYPE), do, dv)
        ds = (p * (dot(v, tl.trans(do), zeros) - delta[None, :])).to(DTYPE)
        dk = dot(ds, q, dk)
        dq = dq.to(tl.float32) + dot(tl.trans(ds), k, tl.zeros([ROWS, WIDTH], tl.float32)) * scale
        store_tile(dq_at, i, grad_query.row, exists, dq, DIM, WIDTH)
    dk = tl.where(counts[:, None], dk * scale, 0.0)
    dv = tl.where(counts[:, None], dv, 0.0)
    place = (split * sizes.kv_heads + kv_head).to(tl.int64) * sizes.virtual_tokens * DIM
    exists = j < sizes.virtual_tokens
    store_tile(grad_key + place, j, DIM, exists, dk, DIM, WIDTH)
    store_tile(grad_value + place, j, DIM, exists, dv, DIM, WIDTH)


def fits(p: AttentionProblem) -> bool:
    """Whether one tile holds the prefix of `p`, and every row sees it."""
    widest = launch.width(max(p.head_dim, p.value_dim))
    return 0 < p.virtual_tokens <= LONGEST and widest <= 128 and p.head_dim == p.value_dim and p.prefix_index is None


def grad_short_prefix(
    p: AttentionProblem, grad_out: Tensor, out: Tensor, lse: Tensor, grad_query: Tensor
) -> tuple[Tensor, Tensor]:
    """Adds the prefix's part to ``grad_query`` [B, H, T, D]; the prefix's own gradients [N, Hkv, P, D] in float32.

    From ``grad_out`` [B, H, T, D] and the merged ``out`` [B, H, T, D] and ``lse`` [B, H, T]. For what :func:`fits`.
    """
    blocks = launch.blocks_for("grad_short_prefix", p)
    blocks = blocks._replace(keys=launch.width(p.virtual_tokens))
    tiles = triton.cdiv(p.queries, blocks.rows)
    in_all = tiles * p.batch * p.group
    splits = max(1, min(launch.PROGRAMS // p.kv_heads, in_all // TILES_A_SPLIT))
    share = triton.cdiv(in_all, splits)
    splits = triton.cdiv(in_all, share)
    grads = [
        torch.empty(splits, 1, p.kv_heads, p.virtual_tokens, p.head_dim, dtype=torch.float32, device=p.query.device)
        for _ in range(2)
    ]
    arguments, constants = launch.arguments(p), launch.constants(p, blocks)
    for unused in ("key", "value", "starts", "padding", "mask", "window"):
        del arguments[unused]
    for unused in ("CAUSAL", "VALUE_DIM", "VALUE_WIDTH"):
        del constants[unused]
    launch.launch(
        grad_short_prefix_kernel, splits * p.kv_heads, blocks, p.query,
        grad_query=launch.view(grad_query), grad_key=grads[0], grad_value=grads[1], grad_out=launch.view(grad_out),
        out=launch.view(out), lse=launch.view(lse), tiles=tiles, share=share, batch=p.batch, scale=p.scale,
        STAGES=blocks.stages, **arguments, **constants,
    )  # fmt: skip
    return reduce_partials(grads[0]), reduce_partials(grads[1])
