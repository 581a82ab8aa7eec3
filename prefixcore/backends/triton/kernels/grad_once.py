"""The whole backward of short sequences in one launch, and one more that adds up the prefix's gradients.

Where little is to be computed a launch costs more than what it launches. No part of the backward needs another's
result, but for delta, and a tile of queries has its own at once from the output that it reads beside the output's
gradient. So three kinds of program stand in one grid, those that take longest first: tiles of keys (`grad_keys`),
splits of the queries for a tile of virtual tokens (`grad_prefix`), and tiles of queries (`grad_query`). Each output is
read a few times more than by `delta`, from the L2 cache; of what nobody wants, the programs are left out.

The splits' partial sums are added in their order by a second kernel; where the
queries are so few that there is one split, it is not needed.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import AttentionProblem
from . import launch
from .delta import Upstream
from .grad_keys import write_grad_keys
from .grad_prefix import splits_of, write_grad_prefix
from .grad_query import write_grad_query
from .sequences import locate, tile_of_program

_REDUCED = 512


@triton.jit
def keys_program(
    program, grad_key, grad_value, upstream, query, key, value, cu_seqlens, padding, mask, sizes, scoring, window,
    tiles, scale, GROUP: tl.constexpr, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of one key/value head. Early tiles come first: the most queries see them."""
    tile, kv_head = program % tiles, program // tiles % sizes.kv_heads
    batch = program // (tiles * sizes.kv_heads)
    sequence, first = locate(tile, batch, cu_seqlens, sizes, BLOCK_N)
    if first < sequence.keys:
        write_grad_keys(
            batch, kv_head, sequence, first, grad_key, grad_value, upstream, query, key, value, padding, mask, scoring,
            window, scale, GROUP, CAUSAL, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, BLOCK_M, BLOCK_N, DTYPE,
        )  # fmt: skip


@triton.jit
def prefix_program(
    program, grad_prefix_key, grad_prefix_value, key_count, value_count, upstream, query, prefix_key, prefix_value,
    bank, cu_seqlens, sizes,
    scoring, tiles, query_splits, sequence_splits, batch, scale, GROUP: tl.constexpr, FOLDED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """BLOCK_N virtual tokens of one entry and key/value head, one split of the queries."""
    tile, kv_head = program % tiles, program // tiles % sizes.kv_heads
    entry = program // (tiles * sizes.kv_heads) % sizes.entries
    split = program // (tiles * sizes.kv_heads * sizes.entries)
    to_key = grad_prefix_key + split.to(tl.int64) * key_count
    to_value = grad_prefix_value + split.to(tl.int64) * value_count
    write_grad_prefix(
        tile, kv_head, entry, split, to_key, to_value, upstream, query, prefix_key, prefix_value, bank, cu_seqlens,
        sizes, scoring, query_splits, sequence_splits, batch, scale, GROUP, FOLDED, HEAD_DIM, BLOCK_D, VALUE_DIM,
        BLOCK_DV, BLOCK_M, BLOCK_N, DTYPE,
    )  # fmt: skip


@triton.jit
def query_program(
    program, grad_query, upstream, query, key, value, prefix_key, prefix_value, bank, cu_seqlens, padding, mask, sizes,
    scoring, window, tiles, scale, GROUP: tl.constexpr, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, DTYPE: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head."""
    batch, kv_head, head, tile = tile_of_program(program, tiles, sizes, GROUP)
    sequence, first = locate(tile, batch, cu_seqlens, sizes, BLOCK_M)
    if first < sequence.queries:
        write_grad_query(
            batch, kv_head, head, sequence, first, grad_query, upstream, query, key, value, prefix_key, prefix_value,
            bank, padding, mask, sizes, scoring, window, scale, CAUSAL, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, BLOCK_M,
            BLOCK_N, DTYPE, PREFIX, PREFIX_ONLY=False,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "key_count", "value_count", "sizes", "window", "scale", "batch", "key_tiles", "key_programs",
        "prefix_tiles", "prefix_programs", "query_splits", "sequence_splits", "query_tiles",
    ]
)  # fmt: skip
def grad_once_kernel(
    grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value, key_count, value_count, grad_out, lse, out,
    grad_lse, query, key, value, prefix_key, prefix_value, bank, cu_seqlens, padding, mask, sizes, scoring, window,
    scale, batch, key_tiles,
    key_programs, prefix_tiles, prefix_programs, query_splits, sequence_splits, query_tiles, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr, FOLDED: tl.constexpr,
    PREFIX: tl.constexpr,
):  # fmt: skip
    """One program of the first kind, the second or the third. What is None is not wanted, and has no programs.

    Whose gradient a program sums up lies in tiles of BLOCK_N rows, and what it sums over in tiles of BLOCK_M.
    """
    program = tl.program_id(0)
    upstream = Upstream(grad_out, lse, delta=None, out=out, grad_lse=grad_lse)
    if program < key_programs:
        if grad_key is not None:
            keys_program(
                program, grad_key, grad_value, upstream, query, key, value, cu_seqlens, padding, mask, sizes, scoring,
                window, key_tiles, scale, GROUP, CAUSAL, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, BLOCK_M, BLOCK_N,
                DTYPE,
            )  # fmt: skip
    elif program < key_programs + prefix_programs:
        if grad_prefix_key is not None:
            prefix_program(
                program - key_programs, grad_prefix_key, grad_prefix_value, key_count, value_count, upstream, query,
                prefix_key, prefix_value, bank, cu_seqlens, sizes, scoring, prefix_tiles, query_splits, sequence_splits,
                batch, scale, GROUP,
                FOLDED, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, BLOCK_M, BLOCK_N, DTYPE,
            )  # fmt: skip
    else:
        if grad_query is not None:
            query_program(
                program - key_programs - prefix_programs, grad_query, upstream, query, key, value, prefix_key,
                prefix_value, bank, cu_seqlens, padding, mask, sizes, scoring, window, query_tiles, scale, GROUP,
                CAUSAL, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, BLOCK_N, BLOCK_M, DTYPE, PREFIX,
            )  # fmt: skip


@triton.jit(do_not_specialize=["key_count", "value_count", "splits"])
def reduce_both_kernel(keys, values, grad_key, grad_value, key_count, value_count, splits, BLOCK: tl.constexpr):
    """The sums of keys [splits, key_count] and values [splits, value_count], in the order of the splits."""
    program, key_programs = tl.program_id(0), tl.cdiv(key_count, BLOCK)
    is_key = program < key_programs
    at = (program - tl.where(is_key, 0, key_programs)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tl.where(is_key, key_count, value_count)
    exists = at < count
    place = tl.where(is_key, keys, values) + at
    sum = tl.zeros([BLOCK], tl.float32)
    for _split in range(0, splits):
        sum += tl.load(place, mask=exists, other=0.0)
        place += count
    tl.store(tl.where(is_key, grad_key, grad_value) + at, sum, mask=exists)


def launch_grad_once(
    p: AttentionProblem, grad_out: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None,
    grad_query: Tensor | None, grad_key: Tensor | None, grad_value: Tensor | None, *, needs_prefix: bool,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Writes the gradients that are given; returns those of the bank, [N, Hkv, P, D] and [N, Hkv, P, Dv] in float32.

    Args:
        p: The arguments of the op.
        grad_out: [B, H, T, Dv].
        out: The output, [B, H, T, Dv].
        lse: The log-sum-exp of prefix and sequence together, [B, H, T].
        grad_lse: Its gradient, [B, H, T], or None.
        grad_query: [B, H, T, D], or None: not wanted.
        grad_key: [B, Hkv, S, D], or None, as `grad_value`.
        grad_value: [B, Hkv, S, Dv], or None.
        needs_prefix: Whether the bank's are wanted.
    """
    blocks = launch.blocks_for("grad_once", p)
    entries, kv_heads, capacity, _ = p.bank[0].shape
    folded = p.prefix_index is None and p.cu_seqlens is None
    query_tiles = launch.tile_count(p, p.queries, blocks.block_n)
    key_tiles = launch.tile_count(p, p.keys, blocks.block_n)
    query_programs = 0 if grad_query is None else query_tiles * p.heads * p.batch
    key_programs = 0 if grad_key is None else key_tiles * kv_heads * p.batch
    prefix_tiles, query_splits, sequence_splits = triton.cdiv(capacity, blocks.block_n), 1, 1
    splits, of_bank, partials = 0, None, None
    counts = [entries * kv_heads * capacity * dim for dim in (p.head_dim, p.value_dim)]
    if needs_prefix:
        query_splits, sequence_splits = splits_of(p, blocks, folded)
        splits = query_splits * sequence_splits
        of_bank = (
            launch.empty(entries, kv_heads, capacity, p.head_dim, like=p.query, dtype=torch.float32),
            launch.empty(entries, kv_heads, capacity, p.value_dim, like=p.query, dtype=torch.float32),
        )
        if splits > 1:
            both = launch.empty(splits * sum(counts), like=p.query, dtype=torch.float32)
            partials = (both, both[splits * counts[0] :])
    to = partials or of_bank or (None, None)
    prefix_programs = prefix_tiles * kv_heads * entries * splits
    launch.launch(
        grad_once_kernel, key_programs + prefix_programs + query_programs, blocks, p.query,
        grad_query=_view(grad_query), grad_key=_view(grad_key), grad_value=_view(grad_value),
        grad_prefix_key=to[0], grad_prefix_value=to[1], key_count=counts[0], value_count=counts[1],
        grad_out=launch.view(grad_out), lse=launch.view(lse),
        out=launch.view(out), grad_lse=_view(grad_lse), scale=p.scale, batch=p.batch, key_tiles=key_tiles,
        key_programs=key_programs, prefix_tiles=prefix_tiles, prefix_programs=prefix_programs,
        query_splits=query_splits, sequence_splits=sequence_splits, query_tiles=query_tiles, FOLDED=folded,
        PREFIX=p.virtual_tokens > 0, **launch.arguments(p), **launch.constants(p, blocks),
    )  # fmt: skip
    if partials and of_bank:
        launch.launch(
            reduce_both_kernel, sum(triton.cdiv(count, _REDUCED) for count in counts),
            launch.Blocks(_REDUCED, 0, 4, 1), p.query, keys=partials[0], values=partials[1], grad_key=of_bank[0],
            grad_value=of_bank[1], key_count=counts[0], value_count=counts[1], splits=splits, BLOCK=_REDUCED,
        )  # fmt: skip
    return of_bank


def _view(x: Tensor | None) -> launch.View | None:
    return None if x is None else launch.view(x)
