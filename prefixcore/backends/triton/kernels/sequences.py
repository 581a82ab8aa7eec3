"""Which sequence, tile and prefix a program works on.

A batch row is one sequence; a packed batch row holds several, one after the other. Queries and keys are counted from
the first of their sequence. `cu_seqlens`, `prefix_index` and `prefix_lengths` are clamped to what is there: their
values are on the GPU, where no check can raise.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Sequence(NamedTuple):
    """A sequence: its number, where it starts in its batch row, and how many queries and keys it has."""

    number: Any
    start: Any
    queries: Any
    keys: Any


@triton.jit
def tile_of_program(program, tiles, sizes, GROUP: tl.constexpr):
    """`(batch, kv_head, head, tile)` of a program, where each head has `tiles` tiles of queries.

    Late tiles come first: under a causal mask they see the most keys. The heads of a group, which read the same keys,
    are neighbours.
    """
    tile = tiles - 1 - program // GROUP % tiles
    kv_head = program // (GROUP * tiles) % sizes.kv_heads
    return program // (GROUP * tiles * sizes.kv_heads), kv_head, kv_head * GROUP + program % GROUP, tile


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def packed_span(number, cu_seqlens, sizes):
    """`(start, length)` of a packed sequence."""
    start = clamp(tl.load(cu_seqlens + number), 0, sizes.queries).to(tl.int32)
    return start, clamp(tl.load(cu_seqlens + number + 1), start, sizes.queries).to(tl.int32) - start


@triton.jit
def locate(tile, batch, cu_seqlens, sizes, BLOCK: tl.constexpr):
    """`(Sequence, first)`: the sequence that tile number `tile` of a batch row belongs to, and the tile's first index.

    Packed sequence n owns the tiles from `cu_seqlens[n] // BLOCK + n` on: enough for it, and a number of tiles that is
    known before a launch without reading the lengths.
    """
    number = batch
    start = batch * 0
    queries, keys = sizes.queries, sizes.keys
    first = tile * BLOCK
    if cu_seqlens is not None:
        low, high = start, start + sizes.sequences
        while high - low > 1:
            middle = (low + high) // 2
            after = tl.load(cu_seqlens + middle).to(tl.int32) // BLOCK + middle > tile
            low, high = tl.where(after, low, middle), tl.where(after, middle, high)
        number = low
        start, queries = packed_span(number, cu_seqlens, sizes)
        keys = queries
        first = tl.maximum(tile - start // BLOCK - number, 0) * BLOCK
    return Sequence(number, start, queries, keys), first


@triton.jit
def prefix_length(entry, bank, sizes):
    """How many virtual tokens of an entry of the bank count."""
    length = sizes.virtual_tokens
    if bank.prefix_lengths is not None:
        length = clamp(tl.load(bank.prefix_lengths + entry), 0, sizes.virtual_tokens).to(tl.int32)
    return length


@triton.jit
def prefix_of(number, bank, sizes):
    """`(entry, length)`: the entry of the bank that sequence `number` sees, and its length (0: sees none)."""
    entry = number * 0
    length = prefix_length(entry, bank, sizes)
    if bank.prefix_index is not None:
        named = tl.load(bank.prefix_index + number)
        entry = clamp(named, 0, sizes.entries - 1).to(tl.int32)
        length = tl.where(named < 0, 0, prefix_length(entry, bank, sizes))
    return entry, length
