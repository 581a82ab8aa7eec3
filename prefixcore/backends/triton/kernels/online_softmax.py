"""The online softmax of a tile of queries, which takes in one tile of keys after another.

Milakov and Gimelshein, arXiv:1805.02867, algorithm 3; Dao, arXiv:2307.08691, algorithm 1. With m the running maximum,
l the running sum and acc the running output, not yet divided by l, a tile of keys is taken in by
    m' = max(m, scores),  alpha = 2^(m - m'),  p = 2^(scores - m'),  l' = l alpha + sum p,  acc' = acc alpha + p V.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: E741  (l is the sum's name in the papers)

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .ranges import tile_count, tile_indices
from .scores import exists_unpadded, score
from .tiles import LOG2E, LOWEST, dot, load_tile


class Keys(NamedTuple):
    """What each tile of keys needs: where the keys lie, which of them, and how they are scored.

    Attributes:
        padding: [S], `Strided`, or None.
        key: One head's [S, D], `Strided`; of the prefix [P, D].
        value: One head's [S, Dv], `Strided`.
        tiles: The keys that any of the queries sees, `ranges.Tiles`.
        score_mod: A `scores.ScoreMod`.
    """

    padding: Any
    key: Any
    value: Any
    tiles: Any
    score_mod: Any


@triton.jit
def empty_state(BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """`(acc, m, l)` before any key."""
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    return acc, tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)


@triton.jit
def update(
    acc, m, l, q, i, keys, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """Updates `acc` [BLOCK_M, BLOCK_DV], `m` and `l` [BLOCK_M] of queries `i` with all `keys`: whole tiles, then edges.

    `q` is [BLOCK_M, BLOCK_D], in the dtype of the products.
    """
    for EDGE in tl.static_range(2):
        for n in range(0, tile_count(keys.tiles, EDGE)):
            j = tile_indices(keys.tiles, n, BLOCK_N, EDGE)  # [BLOCK_N]
            keep = exists_unpadded(j, keys.tiles.end, keys.padding, EDGE)  # [BLOCK_N] or None
            k = load_tile(keys.key, j, keep, HEAD_DIM, q.shape[1], q.dtype)  # [BLOCK_N, BLOCK_D]
            v = load_tile(keys.value, j, keep, VALUE_DIM, acc.shape[1], q.dtype)  # [BLOCK_N, BLOCK_DV]
            products = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32))  # [BLOCK_M, BLOCK_N]
            if keep is not None:
                keep = keep[None, :]
            scores, _slope = score(products, i[:, None], j[None, :], keep, keys.score_mod, CAUSAL, EDGE)
            m_new = tl.maximum(m, tl.max(scores, 1))
            p = tl.exp2(scores - m_new[:, None])  # [BLOCK_M, BLOCK_N]
            alpha = tl.exp2(m - m_new)
            l = l * alpha + tl.sum(p, 1)
            acc = dot(p.to(q.dtype), v, acc * alpha[:, None])
            m = m_new
    return acc, m, l


@triton.jit
def update_sink(acc, m, l, sink):
    """A sink is a key without a value: it adds to l alone."""
    sink = sink.to(tl.float32) * LOG2E
    m_new = tl.maximum(m, sink)
    alpha = tl.exp2(m - m_new)
    return acc * alpha[:, None], m_new, l * alpha + tl.exp2(sink - m_new)
