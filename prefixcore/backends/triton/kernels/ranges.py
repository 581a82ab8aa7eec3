"""Ranges cut into tiles: whole tiles, which need no bounds check and no causal mask, and tiles at the edges."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Tiles(NamedTuple):
    """`[begin, end)` in tiles: `left` edge tiles, then `whole` whole ones, then edge tiles; `edges` are both sides'."""

    begin: Any
    end: Any
    left: Any
    whole: Any
    edges: Any


@triton.jit
def in_tiles(begin, whole_begin, whole_end, end, BLOCK: tl.constexpr):
    """`[begin, end)` as `Tiles`, of which the whole ones lie inside `[whole_begin, whole_end)`."""
    left = tl.cdiv(tl.maximum(tl.minimum(whole_begin, end) - begin, 0), BLOCK)
    whole_begin = begin + left * BLOCK
    whole = tl.maximum(tl.minimum(whole_end, end) - whole_begin, 0) // BLOCK
    right = tl.cdiv(tl.maximum(end - whole_begin - whole * BLOCK, 0), BLOCK)
    return Tiles(begin, end, left, whole, left + right)


@triton.jit
def tile_count(tiles, EDGE: tl.constexpr):
    """How many edge tiles, or whole ones, there are."""
    return tiles.edges if EDGE else tiles.whole


@triton.jit
def tile_indices(tiles, n, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """The indices [BLOCK] in edge tile, or whole tile, number `n`."""
    if EDGE:
        start = tiles.begin + n * BLOCK + tl.where(n < tiles.left, 0, tiles.whole * BLOCK)
    else:
        start = tiles.begin + tiles.left * BLOCK + n * BLOCK
    return start + tl.arange(0, BLOCK)


@triton.jit
def keys_seen(first, last, shift, keys, window, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """The keys that queries `[first, last)` see, as `Tiles`; each query sees all of a whole tile.

    `shift` is S - T: query i stands at key i + shift, so that the last query stands at the last key.
    """
    begin, end = keys * 0, keys
    whole_begin, whole_end = begin, keys
    if CAUSAL:
        end = tl.maximum(tl.minimum(keys, last + shift), 0)
        whole_end = tl.minimum(keys, first + shift + 1)
    if window is not None:
        begin = tl.maximum(first + shift - window + 1, 0)
        whole_begin = tl.maximum(last + shift - window, 0)
    return in_tiles(begin, whole_begin, whole_end, end, BLOCK)


@triton.jit
def queries_seeing(first, last, shift, queries, window, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """The queries that see keys `[first, last)`, as `Tiles`; each query of a whole tile sees all of the keys."""
    begin, end = queries * 0, queries
    whole_begin, whole_end = begin, queries
    if CAUSAL:
        begin = tl.minimum(tl.maximum(first - shift, 0), queries)
        whole_begin = tl.maximum(last - 1 - shift, 0)
    if window is not None:
        end = tl.maximum(tl.minimum(queries, last - 1 + window - shift), begin)
        whole_end = tl.minimum(queries, first + window - shift)
    return in_tiles(begin, whole_begin, whole_end, end, BLOCK)
