"""What the programs of a decode leave for one another, and how the last of them adds it up.

Each split s of an owner's keys leaves its output O_s and log-sum-exp lse_s. With L = log sum exp lse_s the merged
output is sum exp(lse_s - L) O_s, added in the order of the splits (Dao et al., Flash-Decoding, 2023).

The scratch is [splits, B, H, T, Dv] outputs, then [splits, B, H, T] log-sum-exps in units of log 2, all in float32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: E741  (l is the sum's name in the papers)

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import INFINITY, LN2, LOG2E, LOWEST, Strided, store_tile


class Rows(NamedTuple):
    """Queries, each by its batch row, its head and its place in time; `exists` says which of them there are."""

    b: Any
    h: Any
    i: Any
    exists: Any


@triton.jit
def place_of(rows, sizes, GROUP: tl.constexpr):
    """The number of each query among all of [B, H, T]."""
    return (rows.b.to(tl.int64) * (sizes.kv_heads * GROUP) + rows.h) * sizes.queries + rows.i


@triton.jit
def queries_in_all(sizes, work, GROUP: tl.constexpr):
    return work.batches.to(tl.int64) * (sizes.kv_heads * GROUP) * sizes.queries


@triton.jit
def store_partial(scratch, split, rows, acc, m, l, sizes, work, GROUP: tl.constexpr, VALUE_DIM: tl.constexpr):
    """Leaves what one split makes of `rows`: `acc` [rows, BLOCK_DV], not yet divided by `l`."""
    sees = l != 0  # or NaN, which is left to be seen
    divisor = tl.where(sees, l, 1.0)
    in_all = queries_in_all(sizes, work, GROUP)
    place = split * in_all + place_of(rows, sizes, GROUP)
    store_tile(Strided(scratch, VALUE_DIM), place, rows.exists, acc / divisor[:, None], VALUE_DIM)
    log_sum_exps = scratch + (work.shared_splits + work.own_splits) * in_all * VALUE_DIM
    tl.store(log_sum_exps + place, tl.where(sees, m + tl.log2(divisor), -INFINITY), mask=rows.exists)


@triton.jit
def arrive(counter, leads, arrivals):
    """Adds one to the counters of owners, and says of which the count is then `arrivals`.

    `leads` says which of a tensor of counters are meant; None: the one counter. The barrier puts all that this program
    stored before the addition, which releases it; who completes the count acquires what all others released.
    """
    tl.debug_barrier()
    if leads is None:
        completed = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == arrivals - 1
    else:
        before = tl.atomic_add(counter, 1, mask=leads, sem="acq_rel", scope="gpu")
        completed = leads & (before == arrivals - 1)
    return completed


@triton.jit
def merge(
    out, lse, scratch, rows, bank, sinks, sizes, work, GROUP: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Writes output and log-sum-exp of `rows` from all of their splits, BLOCK_SPLITS at a time.

    The first splits are those of a shared prefix, which a batch row without a prefix has not been left.
    """
    tl.debug_barrier()  # for every thread, not only the one whose addition acquired what it reads
    in_all = queries_in_all(sizes, work, GROUP)
    splits = work.shared_splits + work.own_splits
    log_sum_exps = scratch + splits * in_all * VALUE_DIM
    place = place_of(rows, sizes, GROUP)  # [rows]
    dims = tl.arange(0, BLOCK_DV)
    first_left = rows.b * 0
    if bank.prefix_index is not None:
        named = tl.load(bank.prefix_index + rows.b, mask=rows.exists, other=-1)
        first_left = tl.where(named < 0, work.shared_splits, 0).to(tl.int32)
    m = tl.full(place.shape, LOWEST, tl.float32)
    l = tl.zeros(place.shape, tl.float32)
    if sinks is not None:  # a key without a value
        m = tl.load(sinks + rows.h).to(tl.float32) * LOG2E
        l += 1.0
    acc = tl.zeros([place.shape[0], BLOCK_DV], tl.float32)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)  # [BLOCK_SPLITS]
        at = split.to(tl.int64)[:, None] * in_all + place[None, :]  # [BLOCK_SPLITS, rows]
        left = rows.exists[None, :] & (split < splits)[:, None] & (split[:, None] >= first_left[None, :])
        # From the L2 cache, where others have written, and not from this multiprocessor's own.
        lse_s = tl.load(log_sum_exps + at, mask=left, other=-INFINITY, cache_modifier=".cg")
        out_s = tl.load(
            scratch + at[:, :, None] * VALUE_DIM + dims[None, None, :],
            mask=left[:, :, None] & (dims < VALUE_DIM)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        m_new = tl.maximum(m, tl.max(lse_s, 0))
        alpha = tl.exp2(m - m_new)
        weights = tl.exp2(lse_s - m_new[None, :])
        l = l * alpha + tl.sum(weights, 0)
        acc = acc * alpha[:, None] + tl.sum(weights[:, :, None] * out_s, 0)  # [rows, BLOCK_DV]
        m = m_new
    sees = l != 0  # or NaN, which is left to be seen
    divisor = tl.where(sees, l, 1.0)
    store_rows(out, lse, rows, acc / divisor[:, None], tl.where(sees, m + tl.log2(divisor), -INFINITY), VALUE_DIM)


@triton.jit
def store_rows(out, lse, rows, o, log_sum_exp, VALUE_DIM: tl.constexpr):
    """Writes `o` [rows, BLOCK_DV] and `log_sum_exp`, in units of log 2, of queries of any batch rows and heads."""
    b, h, i = rows.b.to(tl.int64), rows.h.to(tl.int64), rows.i.to(tl.int64)
    at = b * out.batch_stride + h * out.head_stride + i * out.row_stride
    store_tile(Strided(out.data, 1), at, rows.exists, o, VALUE_DIM)
    at = b * lse.batch_stride + h * lse.head_stride + i * lse.row_stride
    tl.store(lse.data + at, log_sum_exp * LN2, mask=rows.exists)
