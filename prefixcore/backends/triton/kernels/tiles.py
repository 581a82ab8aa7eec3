"""Tiles: loading, storing and multiplying them."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-1e30)  # below every score, yet finite: differences with it are defined


class Strided(NamedTuple):
    """Rows of a matrix, or elements of a vector: the address of the first, and how many elements apart they lie."""

    base: Any
    stride: Any


@triton.jit
def at(view, batch, head, index):
    """The address of one head's query or key number `index` in a [B, H, T, D] or [B, H, T] tensor."""
    first = view.data + batch.to(tl.int64) * view.batch_stride + head.to(tl.int64) * view.head_stride
    return first + index.to(tl.int64) * view.row_stride


@triton.jit
def head_of(view, batch, head, start):
    """One head of a [B, H, T, D] or [B, H, T] tensor from query or key `start` on, as `Strided`."""
    return Strided(at(view, batch, head, start), view.row_stride)


@triton.jit
def offsets_of(view, batch, head, index):
    """How far queries or keys `index`, of heads and batch rows that may be vectors too, lie from `view.data`."""
    first = batch.to(tl.int64) * view.batch_stride + head.to(tl.int64) * view.head_stride
    return first + index.to(tl.int64) * view.row_stride


@triton.jit
def address(x, index):
    """Where the rows or elements `index` of `x` begin."""
    return x.base + index.to(tl.int64) * x.stride


@triton.jit
def load_tile(x, index, keep, DIM: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Rows `index` of `x`, [len(index), BLOCK]: zeros beyond DIM, and in rows where `keep` (None: all) is false."""
    dims = tl.arange(0, BLOCK)
    place = x.base + index.to(tl.int64)[:, None] * x.stride + dims[None, :]
    if keep is None:
        tile = tl.load(place) if DIM == BLOCK else tl.load(place, mask=dims[None, :] < DIM, other=0.0)
    elif DIM == BLOCK:
        tile = tl.load(place, mask=keep[:, None], other=0.0)
    else:
        tile = tl.load(place, mask=keep[:, None] & (dims[None, :] < DIM), other=0.0)
    return tile.to(DTYPE)


@triton.jit
def store_tile(x, index, keep, tile, DIM: tl.constexpr):
    """Writes `tile` [len(index), BLOCK] to rows `index` of `x`, where `keep` is true, up to DIM."""
    dims = tl.arange(0, tile.shape[1])
    place = x.base + index.to(tl.int64)[:, None] * x.stride + dims[None, :]
    tl.store(place, tile.to(x.base.dtype.element_ty), mask=keep[:, None] & (dims[None, :] < DIM))


@triton.jit
def load_log_sum_exp(lse, index, keep):
    """In units of log 2. A query that sees nothing gets +infinity, which makes its probabilities 0."""
    lse = tl.load(address(lse, index), mask=keep, other=INFINITY)
    return tl.where(tl.abs(lse) == INFINITY, INFINITY, lse * LOG2E)


@triton.jit
def dot(a, b, acc):
    """`acc + a @ b` in float32.

    float32 factors are split into three TF32 products (error about 2^-21): with plain float32 multiply-adds the
    gradients' tiles spill (296 bytes a thread on sm_90, 32 x 32, D = 64). At D = 256 it is the other way round.
    """
    PRECISION: tl.constexpr = "ieee" if max(a.shape[1], b.shape[1]) > 128 else "tf32x3"
    return tl.dot(a, b, acc, input_precision=PRECISION)
