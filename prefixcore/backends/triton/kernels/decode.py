"""Few queries over many keys: the keys are split among the processors, and the parts merged.

The shared prefix is read once per key/value head for all rows of the batch that share it: their queries are one tile
of the matrix product (Juravsky et al., arXiv:2402.05099, section 3.1). The sequence's keys belong to a row alone; its
queries are those of the head's group. Both are split further along the keys (Dao et al., Flash-Decoding, 2023). Each
part writes an output of its own and the log of its denominator, lse_s; with L = log sum exp lse_s the merged output is
sum exp(lse_s - L) O_s, added in the order of the parts.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import AttentionProblem
from . import launch
from .forward import absorb, absorb_prefix
from .tiles import INFINITY, LN2, LOG2E, LOWEST, at, in_tiles, length_of, load_tile, padding_of, store_tile

_KEYS_A_PART = 256  # fewer than this are not worth a part of their own
_PARTS = 16  # read at a time by the merge


@triton.jit(do_not_specialize=["sizes", "window", "tiles", "batches", "parts", "first_part", "share"])
def decode_kernel(
    partial_out, partial_lse, query, key, value, prefix_key, prefix_value, bank, padding, mask, sizes, scoring, window,
    tiles, batches, parts, first_part, share, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DTYPE: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """One program: ``share`` keys of one owner and key/value head, and ROWS of the queries that see them.

    PREFIX: the owner is an entry of the bank, and the rows are (batch, group, time). Otherwise it is a row of the
    batch, and the rows are (group, time).
    """
    program = tl.program_id(0)
    tile, part = program % tiles, program // tiles % parts
    kv_head = program // (tiles * parts) % sizes.kv_heads
    owner = program // (tiles * parts * sizes.kv_heads)
    row = tile * ROWS + tl.arange(0, ROWS)
    b = row // (GROUP * sizes.queries)
    exists = b < (batches if PREFIX else 1)
    begin = part * share

    if PREFIX:
        length = length_of(owner, bank, sizes)
        if bank.entry is not None:
            exists = tl.load(bank.entry + b, mask=exists, other=-1) == owner
            if tl.max(exists.to(tl.int32), 0) == 0:
                return
    else:
        b = b * 0 + owner  # also in rows that do not exist: the mask is read in them, too
        length = sizes.keys
        if window is not None:
            begin += tl.maximum(length - sizes.queries - window + 1, 0)
    end = tl.maximum(tl.minimum(begin + share, length), begin)

    head = kv_head * GROUP + row // sizes.queries % GROUP
    i = row % sizes.queries
    wide_b, wide_h, wide_i = b.to(tl.int64), head.to(tl.int64), i.to(tl.int64)
    offsets = wide_b * query.batch + wide_h * query.head + wide_i * query.row
    q = load_tile(query.data, offsets, 1, exists, DIM, WIDTH, DTYPE)
    acc = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    peak = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)

    if PREFIX:
        acc, peak, total = absorb_prefix(
            acc, peak, total, q, i, prefix_key, prefix_value, owner, kv_head, begin, end, scoring,
            DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, KEYS, DTYPE,
        )  # fmt: skip
    else:
        origin = owner * 0
        shift = sizes.keys - sizes.queries
        mask_from = None
        if mask is not None:
            rows_at = mask.data + wide_b * mask.batch + wide_h * mask.head
            mask_from = (rows_at[:, None], mask.row, mask.key, sizes.queries, sizes.keys)
        padded = padding_of(padding, owner, origin)
        keys = (at(key, owner, kv_head, origin), key.row, at(value, owner, kv_head, origin), value.row)
        whole_begin, whole_end = begin, end
        if CAUSAL:
            whole_end = tl.minimum(end, shift + 1)
        if window is not None:
            whole_begin = tl.maximum(begin, sizes.keys - window)
        rest, whole, left, edges = in_tiles(begin, whole_begin, whole_end, end, KEYS)
        acc, peak, total = absorb(
            acc, peak, total, q, i, keys, padded, rest, whole, whole, left, end, mask_from, scoring, shift,
            window,
            DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, KEYS, DTYPE, CAUSAL, False,
        )  # fmt: skip
        acc, peak, total = absorb(
            acc, peak, total, q, i, keys, padded, begin, edges, whole, left, end, mask_from, scoring, shift,
            window,
            DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, KEYS, DTYPE, CAUSAL, True,
        )  # fmt: skip

    sees = total > 0
    some = tl.where(sees, total, 1.0)
    heads = sizes.kv_heads * GROUP
    place = (((first_part + part).to(tl.int64) * batches + b) * heads + head) * sizes.queries + i
    store_tile(partial_out, place, VALUE_DIM, exists, acc / some[:, None], VALUE_DIM, VALUE_WIDTH)
    tl.store(partial_lse + place, tl.where(sees, peak + tl.log2(some), -INFINITY), mask=exists)


@triton.jit(do_not_specialize=["sizes", "batches", "prefix_parts", "parts"])
def merge_kernel(
    out, lse, partial_out, partial_lse, bank, sinks, sizes, batches, prefix_parts, parts,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program: the parts of one query of one head. The log-sum-exps of parts are in units of log 2."""
    row = tl.program_id(0)
    heads = sizes.kv_heads * GROUP
    i, head, batch = row % sizes.queries, row // sizes.queries % heads, row // (sizes.queries * heads)
    rows = batches.to(tl.int64) * heads * sizes.queries
    first = row * 0
    if bank.entry is not None:  # nobody has written the prefix's parts of a row that has none
        first = tl.where(tl.load(bank.entry + batch) < 0, prefix_parts, 0)
    peak = tl.max(tl.full([PARTS], LOWEST, tl.float32), 0)
    total = peak * 0
    if sinks is not None:
        peak = tl.load(sinks + head).to(tl.float32) * LOG2E
        total += 1.0
    acc = tl.zeros([WIDTH], tl.float32)
    for start in range(first, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        exists = part < parts
        place = part.to(tl.int64) * rows + row
        lse_s = tl.load(partial_lse + place, mask=exists, other=-INFINITY)
        out_s = load_tile(partial_out, place, DIM, exists, DIM, WIDTH, tl.float32)
        higher = tl.maximum(peak, tl.max(lse_s, 0))
        shrink = tl.exp2(peak - higher)
        weights = tl.exp2(lse_s - higher)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(weights[:, None] * out_s, 0)
        peak = higher
    sees = total > 0
    some = tl.where(sees, total, 1.0)
    dims = tl.arange(0, WIDTH)
    tl.store(at(out, batch, head, i) + dims, (acc / some).to(out.data.dtype.element_ty), mask=dims < DIM)
    tl.store(at(lse, batch, head, i), tl.where(sees, (peak + tl.log2(some)) * LN2, -INFINITY))


def _parts(keys: int, programs: int, tile: int) -> tuple[int, int]:
    """``(parts, keys a part)``: enough parts for a busy device, none too small."""
    if keys == 0:
        return 0, tile
    parts = min(triton.cdiv(launch.PROGRAMS, max(programs, 1)), triton.cdiv(keys, _KEYS_A_PART))
    share = triton.cdiv(triton.cdiv(keys, parts), tile) * tile
    return triton.cdiv(keys, share), share


def decode(p: AttentionProblem, out: Tensor, lse: Tensor) -> None:
    """Writes ``out`` [B, H, T, Dv] and ``lse`` [B, H, T] as :func:`.forward.forward` does, made for a T of a few.

    Not for packed sequences. The scratch is float32: a [B, H, T, Dv] a part.
    """
    if p.cu_seqlens is not None:
        raise ValueError("decode: expected one sequence a row, got cu_seqlens: use forward for packed sequences")
    shared, own = launch.blocks_for("decode_prefix", p), launch.blocks_for("decode_sequence", p)
    entries = p.bank[0].shape[0]
    rows = p.group * p.queries
    shared_tiles, own_tiles = triton.cdiv(p.batch * rows, shared.rows), triton.cdiv(rows, own.rows)
    # A row belongs to one entry of a bank, so a tile of rows is the work of about one entry.
    prefix_parts, prefix_share = _parts(p.virtual_tokens, shared_tiles * p.kv_heads, shared.keys)
    visible = min(p.keys, p.window + p.queries - 1) if p.window else p.keys
    own_parts, own_share = _parts(visible, own_tiles * p.kv_heads * p.batch, own.keys)
    parts = prefix_parts + own_parts
    partial_out = torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)
    partial_lse = torch.empty(parts, *lse.shape, dtype=torch.float32, device=out.device)

    arguments = launch.arguments(p)
    del arguments["starts"]
    arguments |= {"partial_out": partial_out, "partial_lse": partial_lse, "batches": p.batch}
    launch.launch(
        decode_kernel, shared_tiles * prefix_parts * p.kv_heads * entries, shared, p.query, tiles=shared_tiles,
        parts=prefix_parts, first_part=0, share=prefix_share, PREFIX=True,
        **arguments, **launch.constants(p, shared),
    )  # fmt: skip
    launch.launch(
        decode_kernel, own_tiles * own_parts * p.kv_heads * p.batch, own, p.query, tiles=own_tiles,
        parts=own_parts, first_part=prefix_parts, share=own_share, PREFIX=False,
        **arguments, **launch.constants(p, own),
    )  # fmt: skip
    launch.launch(
        merge_kernel, p.batch * p.heads * p.queries, launch.Blocks(1, _PARTS, 4, 1), p.query,
        out=launch.view(out), lse=launch.view(lse), partial_out=partial_out, partial_lse=partial_lse,
        bank=arguments["bank"], sinks=launch.flat(p.sinks), sizes=arguments["sizes"], batches=p.batch,
        prefix_parts=prefix_parts, parts=parts, GROUP=p.group, DIM=p.value_dim, WIDTH=launch.width(p.value_dim),
        PARTS=_PARTS,
    )  # fmt: skip
