"""Few queries over many keys: the keys are split among programs, and the splits' outputs merged.

A prefix is read once per key/value head for all batch rows that share it: their queries are one tile of the matrix
product (Juravsky et al., arXiv:2402.05099, section 3.1). The keys of a sequence are seen by one batch row alone; its
tile of queries is that of the heads of a group. Both are split along the keys (Dao et al., Flash-Decoding, 2023). Each
split writes its own output and log-sum-exp, lse_s; with L = log sum exp lse_s the merged output is
sum exp(lse_s - L) O_s, added in the order of the splits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: E741  (l is the sum's name in the papers)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import AttentionProblem
from . import launch
from .online_softmax import Keys, empty_state, update
from .ranges import in_tiles
from .scores import Mask, ScoreMod, padding_of
from .sequences import prefix_length
from .tiles import INFINITY, LN2, LOG2E, LOWEST, Strided, at, head_of, load_tile, store_tile

KEYS_PER_SPLIT = 256  # fewer than this are not worth a split of their own
_BLOCK_SPLITS = 16  # how many splits are merged at a time


@triton.jit(do_not_specialize=["sizes", "window", "tiles", "batches", "splits", "first_split", "share"])
def decode_kernel(
    partial_out, partial_lse, query, key, value, prefix_key, prefix_value, bank, padding, mask, sizes, scoring, window,
    tiles, batches, splits, first_split, share, GROUP: tl.constexpr, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, DTYPE: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """One program: a split of `share` keys of one key/value head, and BLOCK_M of the queries that see them.

    PREFIX: the keys are those of one entry of the bank, and the queries are folded as (batch, group, time). Otherwise
    the keys are those of one batch row, and the queries are folded as (group, time).
    """
    program = tl.program_id(0)
    tile, split = program % tiles, program // tiles % splits
    kv_head = program // (tiles * splits) % sizes.kv_heads
    owner = program // (tiles * splits * sizes.kv_heads)  # an entry, or a batch row
    folded = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    b = folded // (GROUP * sizes.queries)  # [BLOCK_M]
    exists = b < (batches if PREFIX else 1)
    begin = split * share

    if PREFIX:
        length = prefix_length(owner, bank, sizes)
        if bank.prefix_index is not None:
            exists = tl.load(bank.prefix_index + b, mask=exists, other=-1) == owner
            if tl.max(exists.to(tl.int32), 0) == 0:
                return
    else:
        b = b * 0 + owner  # also of queries that do not exist: the mask is read for them, too
        length = sizes.keys
        if window is not None:
            begin += tl.maximum(length - sizes.queries - window + 1, 0)
    end = tl.maximum(tl.minimum(begin + share, length), begin)

    h = kv_head * GROUP + folded // sizes.queries % GROUP  # [BLOCK_M]
    i = folded % sizes.queries  # [BLOCK_M]
    wide_b, wide_h, wide_i = b.to(tl.int64), h.to(tl.int64), i.to(tl.int64)
    offsets = wide_b * query.batch_stride + wide_h * query.head_stride + wide_i * query.row_stride
    q = load_tile(Strided(query.data, 1), offsets, exists, HEAD_DIM, BLOCK_D, DTYPE)  # [BLOCK_M, BLOCK_D]

    origin = owner * 0
    if PREFIX:
        keys = Keys(
            padding=None,
            key=head_of(prefix_key, owner, kv_head, origin),
            value=head_of(prefix_value, owner, kv_head, origin),
            tiles=in_tiles(begin, begin, end, end, BLOCK_N),
            score_mod=ScoreMod(scoring, mask=None, shift=0, window=None),
        )
    else:
        shift = sizes.keys - sizes.queries
        mask_at = None
        if mask is not None:
            base = mask.data + wide_b * mask.batch_stride + wide_h * mask.head_stride  # [BLOCK_M]
            mask_at = Mask(base[:, None], mask.row_stride, mask.key_stride, sizes.queries, sizes.keys)
        padded = padding_of(padding, owner, origin)
        k_head, v_head = head_of(key, owner, kv_head, origin), head_of(value, owner, kv_head, origin)
        whole_begin, whole_end = begin, end
        if CAUSAL:
            whole_end = tl.minimum(end, shift + 1)
        if window is not None:
            whole_begin = tl.maximum(begin, sizes.keys - window)
        tiles_seen = in_tiles(begin, whole_begin, whole_end, end, BLOCK_N)
        keys = Keys(padded, k_head, v_head, tiles_seen, ScoreMod(scoring, mask_at, shift, window))
    acc, m, l = empty_state(BLOCK_M, BLOCK_DV)  # [BLOCK_M, BLOCK_DV], [BLOCK_M], [BLOCK_M]
    acc, m, l = update(acc, m, l, q, i, keys, HEAD_DIM, VALUE_DIM, BLOCK_N, CAUSAL and not PREFIX)

    sees = l != 0  # or NaN, which is left to be seen
    divisor = tl.where(sees, l, 1.0)
    heads = sizes.kv_heads * GROUP
    place = (((first_split + split).to(tl.int64) * batches + b) * heads + h) * sizes.queries + i
    store_tile(Strided(partial_out, VALUE_DIM), place, exists, acc / divisor[:, None], VALUE_DIM)
    tl.store(partial_lse + place, tl.where(sees, m + tl.log2(divisor), -INFINITY), mask=exists)


@triton.jit(do_not_specialize=["sizes", "batches", "prefix_splits", "splits"])
def merge_kernel(
    out, lse, partial_out, partial_lse, bank, sinks, sizes, batches, prefix_splits, splits,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """One program: the splits of one query of one head. Their log-sum-exps are in units of log 2."""
    folded = tl.program_id(0)  # (batch, head, time)
    heads = sizes.kv_heads * GROUP
    i, head, batch = folded % sizes.queries, folded // sizes.queries % heads, folded // (sizes.queries * heads)
    queries = batches.to(tl.int64) * heads * sizes.queries
    first = folded * 0
    if bank.prefix_index is not None:  # the prefix's splits of a batch row without a prefix are not written
        first = tl.where(tl.load(bank.prefix_index + batch) < 0, prefix_splits, 0)
    m = tl.max(tl.full([BLOCK_SPLITS], LOWEST, tl.float32), 0)
    l = m * 0
    if sinks is not None:
        m = tl.load(sinks + head).to(tl.float32) * LOG2E
        l += 1.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for start in range(first, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        exists = split < splits
        place = split.to(tl.int64) * queries + folded
        lse_s = tl.load(partial_lse + place, mask=exists, other=-INFINITY)  # [BLOCK_SPLITS]
        out_rows = Strided(partial_out, VALUE_DIM)
        out_s = load_tile(out_rows, place, exists, VALUE_DIM, BLOCK_DV, tl.float32)  # [BLOCK_SPLITS, BLOCK_DV]
        m_new = tl.maximum(m, tl.max(lse_s, 0))
        alpha = tl.exp2(m - m_new)
        weights = tl.exp2(lse_s - m_new)
        l = l * alpha + tl.sum(weights, 0)
        acc = acc * alpha + tl.sum(weights[:, None] * out_s, 0)
        m = m_new
    sees = l != 0  # or NaN, which is left to be seen
    divisor = tl.where(sees, l, 1.0)
    dims = tl.arange(0, BLOCK_DV)
    tl.store(at(out, batch, head, i) + dims, (acc / divisor).to(out.data.dtype.element_ty), mask=dims < VALUE_DIM)
    tl.store(at(lse, batch, head, i), tl.where(sees, (m + tl.log2(divisor)) * LN2, -INFINITY))


def _splits(keys: int, programs: int, block_n: int) -> tuple[int, int]:
    """`(splits, keys a split)`: enough splits for a busy device, none too small."""
    if keys == 0:
        return 0, block_n
    splits = min(triton.cdiv(launch.PROGRAMS, max(programs, 1)), triton.cdiv(keys, KEYS_PER_SPLIT))
    share = triton.cdiv(triton.cdiv(keys, splits), block_n) * block_n
    return triton.cdiv(keys, share), share


def launch_decode(p: AttentionProblem, out: Tensor, lse: Tensor) -> None:
    """Writes `out` [B, H, T, Dv] and `lse` [B, H, T] as `forward.launch_forward` does; quick for a T of a few.

    Not for packed sequences. The scratch is float32: a [B, H, T, Dv] for each split.
    """
    if p.cu_seqlens is not None:
        raise ValueError("decode: expected one sequence in each batch row, got cu_seqlens: use forward.launch_forward")
    shared, own = launch.blocks_for("decode_prefix", p), launch.blocks_for("decode_sequence", p)
    entries = p.bank[0].shape[0]
    queries = p.group * p.queries
    shared_tiles, own_tiles = triton.cdiv(p.batch * queries, shared.block_m), triton.cdiv(queries, own.block_m)
    # A batch row sees one entry of a bank, so all entries together make about the work of one.
    prefix_splits, prefix_share = _splits(p.virtual_tokens, shared_tiles * p.kv_heads, shared.block_n)
    visible = min(p.keys, p.window + p.queries - 1) if p.window else p.keys
    visible = launch.length_bucket(visible)
    own_splits, own_share = _splits(visible, own_tiles * p.kv_heads * p.batch, own.block_n)
    splits = prefix_splits + own_splits
    partial_out = launch.empty(splits, *out.shape, like=out, dtype=torch.float32)
    partial_lse = launch.empty(splits, *lse.shape, like=out, dtype=torch.float32)

    arguments = launch.arguments(p)
    del arguments["cu_seqlens"]
    arguments |= {"partial_out": partial_out, "partial_lse": partial_lse, "batches": p.batch}
    launch.launch(
        decode_kernel, shared_tiles * prefix_splits * p.kv_heads * entries, shared, p.query, p.key, tiles=shared_tiles,
        splits=prefix_splits, first_split=0, share=prefix_share, PREFIX=True,
        **arguments, **launch.constants(p, shared),
    )  # fmt: skip
    launch.launch(
        decode_kernel, own_tiles * own_splits * p.kv_heads * p.batch, own, p.query, p.key, tiles=own_tiles,
        splits=own_splits, first_split=prefix_splits, share=own_share, PREFIX=False,
        **arguments, **launch.constants(p, own),
    )  # fmt: skip
    launch.launch(
        merge_kernel, p.batch * p.heads * p.queries, launch.Blocks(1, _BLOCK_SPLITS, 4, 1), p.query, p.key,
        out=launch.view(out), lse=launch.view(lse), partial_out=partial_out, partial_lse=partial_lse,
        bank=arguments["bank"], sinks=launch.contiguous(p.sinks), sizes=arguments["sizes"], batches=p.batch,
        prefix_splits=prefix_splits, splits=splits, GROUP=p.group, VALUE_DIM=p.value_dim,
        BLOCK_DV=launch.padded(p.value_dim), BLOCK_SPLITS=_BLOCK_SPLITS,
    )  # fmt: skip
