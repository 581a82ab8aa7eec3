"""Prefix and sequence side by side, for a kernel that knows one run of keys: laid out, and their gradients taken apart.

What is laid out for each sequence is its prefix and then its own keys, `[B, P + S, Hkv, D]`. A shorter prefix of a bank
(or none) leaves room at the end, which is filled with zeros: a masked key counts 0 times its value, and that must not
be NaN. Packed rows follow one another, `[T + sequences * P, Hkv, D]`, the room again at the end. Everything here moves
each element once, at a copy's rate; the gradients of the prefix are summed over the sequences that see it, in float32
and in their order.

A *row* is one head of one token; rows are numbered as `[..., tokens, heads]` memory has them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import AttentionProblem
from ..flash4 import Spans
from . import launch
from .sequences import clamp, prefix_of
from .tiles import at

_ROWS = 32
"""Rows a program."""
_SUMMED = 4
"""Rows a program where it sums over the sequences: a short prefix has few of them."""
_SCANNED = 1024
"""Sequences that are counted at a time."""


# --- where the sequences are --------------------------------------------------------------------------


@triton.jit(do_not_specialize=["sizes"])
def spans_kernel(query_ends, key_ends, used, bank, cu_seqlens, sizes, BLOCK: tl.constexpr):
    """One program: how many keys each batch row uses, or where each packed sequence's queries and keys end.

    `cu_seqlens` is made to rise, and to stay in what is there.
    """
    if cu_seqlens is None:
        for first in range(0, sizes.sequences, BLOCK):
            n = first + tl.arange(0, BLOCK)
            exists = n < sizes.sequences
            _entry, length = prefix_of(tl.where(exists, n, 0), bank, sizes)
            tl.store(used + n, length + sizes.keys, mask=exists)
    else:
        begin = clamp(tl.load(cu_seqlens), 0, sizes.queries).to(tl.int32)
        tl.store(query_ends, begin)
        tl.store(key_ends, begin)
        prefixes = begin * 0
        for first in range(0, sizes.sequences, BLOCK):
            n = first + tl.arange(0, BLOCK)
            exists = n < sizes.sequences
            start = clamp(tl.load(cu_seqlens + n, mask=exists, other=0), 0, sizes.queries).to(tl.int32)
            end = clamp(tl.load(cu_seqlens + n + 1, mask=exists, other=0), 0, sizes.queries).to(tl.int32)
            tokens = tl.where(exists, tl.maximum(end - start, 0), 0)
            _entry, length = prefix_of(tl.where(exists, n, 0), bank, sizes)
            length = tl.where(exists, length, 0)
            ends = tl.minimum(begin + tl.cumsum(tokens, 0), sizes.queries)
            tl.store(query_ends + n + 1, ends, mask=exists)
            tl.store(key_ends + n + 1, ends + prefixes + tl.cumsum(length, 0), mask=exists)
            begin = tl.minimum(begin + tl.sum(tokens, 0), sizes.queries)
            prefixes += tl.sum(length, 0)


@triton.jit
def find(ends, sequences, steps, token):
    """For each `token` the last sequence that begins at it or before: 2^steps are more than there are `sequences`."""
    low = token * 0
    high = low + sequences
    for _step in range(0, steps):
        middle = (low + high) // 2
        after = tl.load(ends + middle) > token
        low = tl.where(after, low, tl.maximum(low, middle))
        high = tl.where(after & (high - low > 1), middle, high)
    return low


# --- laying out ---------------------------------------------------------------------------------------


@triton.jit
def lay_rows(
    to, source, prefix, batch, tile, slots, spans, bank, sizes, steps, PACKED: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of `to` [B, Hkv, slots, D]: of the prefix, of the sequence, or of neither and then zeros."""
    row = tile * ROWS + tl.arange(0, ROWS)  # [ROWS]
    slot, head = row // sizes.kv_heads, row % sizes.kv_heads
    exists = slot < slots
    number = row * 0 + batch
    token, first, own = slot, row * 0, row * 0 + sizes.keys
    if PACKED:
        number = find(spans.keys, sizes.sequences, steps, slot)
        token = slot - tl.load(spans.keys + number)
        first = tl.load(spans.queries + number)
        own = tl.load(spans.queries + number + 1) - first
    entry, length = prefix_of(number, bank, sizes)
    of_prefix = exists & (token >= 0) & (token < length)
    of_sequence = exists & (token >= length) & (token < length + own)
    dims = tl.arange(0, BLOCK)
    fits = dims[None, :] < DIM
    virtual = tl.load(
        at(prefix, entry, head, token)[:, None] + dims[None, :], mask=of_prefix[:, None] & fits, other=0.0
    )
    real = tl.load(
        at(source, row * 0 + batch, head, first + token - length)[:, None] + dims[None, :],
        mask=of_sequence[:, None] & fits, other=0.0,
    )  # fmt: skip
    kind = to.data.dtype.element_ty
    rows = tl.where(of_prefix[:, None], virtual.to(kind), real.to(kind))
    tl.store(at(to, row * 0 + batch, head, slot)[:, None] + dims[None, :], rows, mask=exists[:, None] & fits)


@triton.jit(do_not_specialize=["slots", "tiles", "steps", "sizes"])
def lay_kernel(
    keys, values, key, value, prefix_key, prefix_value, slots, tiles, spans, bank, sizes, steps,
    PACKED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of the keys or of the values; both have `tiles` of these a batch row."""
    program = tl.program_id(0)
    tile, batch = program // 2 % tiles, program // 2 // tiles
    if program % 2 == 0:
        lay_rows(keys, key, prefix_key, batch, tile, slots, spans, bank, sizes, steps, PACKED, DIM, BLOCK, ROWS)
    else:
        lay_rows(values, value, prefix_value, batch, tile, slots, spans, bank, sizes, steps, PACKED, DIM, BLOCK, ROWS)


# --- taking apart -------------------------------------------------------------------------------------


@triton.jit
def take_rows(
    to, laid, batch, tile, spans, bank, sizes, steps, PACKED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of `to` [B, Hkv, S, D]: zeros for what is in no sequence."""
    row = tile * ROWS + tl.arange(0, ROWS)  # [ROWS]
    token, head = row // sizes.kv_heads, row % sizes.kv_heads
    exists = token < sizes.keys
    inside = exists
    if PACKED:
        number = find(spans.queries, sizes.sequences, steps, token)
        end = tl.load(spans.queries + number + 1)
        # A sequence's own keys stand at its end.
        slot = tl.load(spans.keys + number + 1) - end + token
        inside = exists & (token >= tl.load(spans.queries + number)) & (token < end)
    else:
        _entry, length = prefix_of(batch, bank, sizes)
        slot = length + token
    dims = tl.arange(0, BLOCK)
    fits = dims[None, :] < DIM
    rows = tl.load(
        at(laid, row * 0 + batch, head, slot)[:, None] + dims[None, :], mask=inside[:, None] & fits, other=0.0
    )
    tl.store(at(to, row * 0 + batch, head, token)[:, None] + dims[None, :], rows, mask=exists[:, None] & fits)


@triton.jit(do_not_specialize=["tiles", "steps", "sizes"])
def take_kernel(
    grad_key, grad_value, keys, values, tiles, spans, bank, sizes, steps, PACKED: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of the gradient of the keys or of the values."""
    program = tl.program_id(0)
    tile, batch = program // 2 % tiles, program // 2 // tiles
    if program % 2 == 0:
        take_rows(grad_key, keys, batch, tile, spans, bank, sizes, steps, PACKED, DIM, BLOCK, ROWS)
    else:
        take_rows(grad_value, values, batch, tile, spans, bank, sizes, steps, PACKED, DIM, BLOCK, ROWS)


@triton.jit
def sum_rows(
    to, laid, wanted, tile, spans, bank, sizes, PACKED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of entry `wanted` of `to` [N, Hkv, P, D], summed over the sequences that see it, in their order."""
    row = tile * ROWS + tl.arange(0, ROWS)  # [ROWS]
    token, head = row // sizes.kv_heads, row % sizes.kv_heads
    exists = token < sizes.virtual_tokens
    dims = tl.arange(0, BLOCK)
    fits = dims[None, :] < DIM
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for number in tl.range(0, sizes.sequences, loop_unroll_factor=4):  # so that several loads are under way
        entry, length = prefix_of(number, bank, sizes)
        batch, slot = number, token
        if PACKED:
            batch, slot = number * 0, token + tl.load(spans.keys + number)
        sees = exists & (token < length) & (row * 0 + entry == wanted)
        part = tl.load(
            at(laid, row * 0 + batch, head, slot)[:, None] + dims[None, :], mask=sees[:, None] & fits, other=0.0
        )
        total += part.to(tl.float32)
    tl.store(at(to, row * 0 + wanted, head, token)[:, None] + dims[None, :], total, mask=exists[:, None] & fits)


@triton.jit(do_not_specialize=["tiles", "sizes"])
def sum_kernel(
    grad_key, grad_value, keys, values, tiles, spans, bank, sizes, PACKED: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of one entry, of the gradient of its keys or of its values."""
    program = tl.program_id(0)
    tile, wanted = program // 2 % tiles, program // 2 // tiles
    if program % 2 == 0:
        sum_rows(grad_key, keys, wanted, tile, spans, bank, sizes, PACKED, DIM, BLOCK, ROWS)
    else:
        sum_rows(grad_value, values, wanted, tile, spans, bank, sizes, PACKED, DIM, BLOCK, ROWS)


# --- launching ----------------------------------------------------------------------------------------


def launch_spans(p: AttentionProblem) -> Spans:
    """Where the sequences of `p` stand, prefix included; nothing but None where every batch row uses all there is."""
    arguments = launch.arguments(p)
    query_ends = key_ends = used = None
    if p.cu_seqlens is not None:
        query_ends, key_ends = (launch.empty(p.sequences + 1, like=p.query, dtype=torch.int32) for _ in range(2))
    elif p.virtual_tokens and (p.prefix_index is not None or p.prefix_lengths is not None):
        used = launch.empty(p.batch, like=p.query, dtype=torch.int32)
    else:
        return Spans()
    launch.launch(
        spans_kernel, 1, launch.Blocks(_SCANNED, 0, 4, 1), p.query, query_ends=query_ends, key_ends=key_ends, used=used,
        bank=arguments["bank"], cu_seqlens=arguments["cu_seqlens"], sizes=arguments["sizes"], BLOCK=_SCANNED,
    )  # fmt: skip
    return Spans(query_ends, key_ends, used)


def launch_lay(p: AttentionProblem, spans: Spans) -> tuple[Tensor, Tensor]:
    """Keys and values with their prefix in front, [B, Hkv, P + S, D] as [B, P + S, Hkv, D] memory has them.

    Packed: [1, Hkv, T + sequences * P, D].
    """
    slots = p.keys + p.virtual_tokens * (1 if p.cu_seqlens is None else p.sequences)
    keys, values = (
        launch.empty(p.batch, slots, p.kv_heads, p.head_dim, like=p.query).transpose(1, 2) for _ in range(2)
    )
    prefix_key, prefix_value = p.bank
    tiles = triton.cdiv(slots * p.kv_heads, _ROWS)
    _launch(
        lay_kernel, p, spans, tiles * p.batch, keys=launch.view(keys), values=launch.view(values),
        key=launch.view(p.key), value=launch.view(p.value), prefix_key=launch.view(prefix_key),
        prefix_value=launch.view(prefix_value), slots=slots, tiles=tiles, steps=_steps(p),
    )  # fmt: skip
    return keys, values


def launch_take(
    p: AttentionProblem, spans: Spans, grad_keys: Tensor, grad_values: Tensor, grad_key: Tensor, grad_value: Tensor
) -> None:
    """Writes the gradients of key and value [B, Hkv, S, D]: their part of those of what `launch_lay` gave."""
    tiles = triton.cdiv(p.keys * p.kv_heads, _ROWS)
    _launch(
        take_kernel, p, spans, tiles * p.batch, grad_key=launch.view(grad_key), grad_value=launch.view(grad_value),
        keys=launch.view(grad_keys), values=launch.view(grad_values), tiles=tiles, steps=_steps(p),
    )  # fmt: skip


def launch_sum(p: AttentionProblem, spans: Spans, grad_keys: Tensor, grad_values: Tensor) -> tuple[Tensor, Tensor]:
    """The prefix's part of the gradients of what `launch_lay` gave: [N, Hkv, P, D] in float32."""
    entries = p.bank[0].shape[0]
    sums = [
        launch.empty(entries, p.kv_heads, p.virtual_tokens, p.head_dim, like=p.query, dtype=torch.float32)
        for _ in range(2)
    ]
    tiles = triton.cdiv(p.virtual_tokens * p.kv_heads, _SUMMED)
    _launch(
        sum_kernel, p, spans, tiles * entries, _SUMMED, grad_key=launch.view(sums[0]), grad_value=launch.view(sums[1]),
        keys=launch.view(grad_keys), values=launch.view(grad_values), tiles=tiles,
    )  # fmt: skip
    return sums[0], sums[1]


def _steps(p: AttentionProblem) -> int:
    return p.sequences.bit_length()


def _launch(kernel: Any, p: AttentionProblem, spans: Spans, units: int, rows: int = _ROWS, **arguments: Any) -> None:
    """Two programs for each of `units` tiles: one for the keys, one for the values."""
    common = launch.arguments(p)
    launch.launch(
        kernel, 2 * units, launch.Blocks(rows, 0, 4, 1), p.query, spans=spans, bank=common["bank"],
        sizes=common["sizes"], PACKED=p.cu_seqlens is not None, DIM=p.head_dim, BLOCK=launch.padded(p.head_dim),
        ROWS=rows, **arguments,
    )  # fmt: skip
