"""How the keys of `decode_once` are shared out among its programs: by shapes alone, so that bits stay the same.

What bounds it is memory: each key and value is read once, for a dozen operations a byte. Little's law asks for some
25 KiB under way on each of an H200's 132 multiprocessors (4.2 TB/s times 800 ns); a tile of 64 keys of 128 is 32 KiB of
keys and values, and a program prefetches one to two tiles. So two programs fit each multiprocessor and either is
enough. A grid of `4 * PROGRAMS` programs, eight a multiprocessor, evens out the end, when some are idle: less than one
part in eight. The shared programs come first: their arithmetic, 64 queries a key, is hidden behind the own programs'
reads, and it is the own programs that merge, each its few queries, rather than a shared one those of all its rows.
The scratch is a float32 output a split, 3 % of what is read at 256 keys of 128 in bfloat16 and four heads a group, and
stays in the L2 cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton

from ...problem import AttentionProblem
from . import launch

KEYS_PER_SPLIT = 256  # fewer than this are not worth a split of their own, if there is enough to do
SHARED_KEYS = 256  # of a prefix of fewer virtual tokens each batch row reads its own copy, from the L2 cache


class Work(NamedTuple):
    """How the work is shared out.

    Attributes:
        batches: Batch rows.
        units: Owners a batch row has for each key/value head.
        unit: Queries of an owner, folded as (group, time).
        own_splits: Splits of an owner's own keys.
        own_share: Keys of such a split.
        shared: Shared programs, which come first.
        shared_tiles: Tiles of owners, as many as fit, whose queries a shared program has.
        shared_splits: Splits of an entry of the bank.
        shared_share: Virtual tokens of such a split.
        arrivals: How many programs add to an owner's counter.
    """

    batches: Any
    units: Any
    unit: Any
    own_splits: Any
    own_share: Any
    shared: Any
    shared_tiles: Any
    shared_splits: Any
    shared_share: Any
    arrivals: Any


def shared_out(p: AttentionProblem, blocks: launch.Blocks) -> tuple[Work, int, int]:
    """`(work, block_m, shared_m)` by shapes alone: a tile is `block_m` queries of one owner, or `shared_m` of several.

    `shared_m` is 0 where no prefix is shared.
    """
    queries, entries = p.group * p.queries, p.bank[0].shape[0]
    block_m = min(max(16, triton.next_power_of_2(queries)), max(16, blocks.block_m))
    unit = min(queries, block_m)
    units = triton.cdiv(queries, unit)
    owners, shared_m = p.batch * units, max(blocks.block_m, block_m)
    tiles = triton.cdiv(owners, shared_m // unit)
    # Reading an entry for a tile of rows pays where at least two rows would have read it themselves.
    shares = p.virtual_tokens >= SHARED_KEYS and 2 * tiles * entries <= owners
    own_keys = launch.length_bucket(min(p.keys, p.window + p.queries - 1) if p.window else p.keys)
    if not shares:
        own_keys += p.virtual_tokens
    keys = p.kv_heads * (owners * own_keys + (tiles * p.virtual_tokens if shares else 0))
    least = KEYS_PER_SPLIT if keys >= KEYS_PER_SPLIT * launch.PROGRAMS else KEYS_PER_SPLIT // 2
    share = max(triton.cdiv(keys, 4 * launch.PROGRAMS), least)
    own_splits, own_share = _splits(own_keys, share, blocks.block_n)
    shared_splits, shared_share = _splits(p.virtual_tokens, share, blocks.block_n) if shares else (0, 0)
    shared = tiles * shared_splits * p.kv_heads * entries
    arrivals = own_splits + shared_splits * entries
    work = Work(p.batch, units, unit, own_splits, own_share, shared, tiles, shared_splits, shared_share, arrivals)
    return work, block_m, shared_m if shares else 0


def _splits(keys: int, share: int, block_n: int) -> tuple[int, int]:
    """`(splits, keys a split)`, equally many in each, of about `share`: one split where there are no keys."""
    splits = max(1, triton.cdiv(keys, share))
    share = triton.cdiv(triton.cdiv(max(keys, 1), splits), block_n) * block_n
    return max(1, triton.cdiv(keys, share)), share
