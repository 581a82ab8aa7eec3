"""Scores: what the products of queries and keys become before the softmax, in one place for every kernel.

Scores are in units of log 2 (the products are multiplied by scale * log2(e)), so that a probability is one exp2. The
score of a key that a query does not see is -infinity. An argument that is None is known at compile time, and what
depends on it is not compiled.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import INFINITY, LOG2E, Strided, address, at

HIDDEN = tl.constexpr(-1e30)  # an additive mask at or below this hides the key


class Mask(NamedTuple):
    """One sequence's part of a [B, H, T, S] mask: the address of its first element, strides and sizes."""

    base: Any
    query_stride: Any
    key_stride: Any
    queries: Any
    keys: Any


class ScoreMod(NamedTuple):
    """What is done to the products of queries and keys, beside a causal mask.

    Attributes:
        scoring: The scale and the softcap, a `launch.Scoring`.
        mask: A `Mask` or None.
        shift: Query i stands at key i + shift.
        window: How many keys a query sees, up to its own; None: all.
    """

    scoring: Any
    mask: Any
    shift: Any
    window: Any


@triton.jit
def mask_of(mask, batch, head, sequence):
    """A sequence's part of the mask, or None."""
    part = None
    if mask is not None:
        base = at(mask, batch, head, sequence.start) + sequence.start.to(tl.int64) * mask.key_stride
        part = Mask(base, mask.row_stride, mask.key_stride, sequence.queries, sequence.keys)
    return part


@triton.jit
def padding_of(padding, batch, start):
    """A sequence's part of the padding as `Strided`, or None."""
    part = None
    if padding is not None:
        base = padding.data + batch.to(tl.int64) * padding.batch_stride + start.to(tl.int64) * padding.key_stride
        part = Strided(base, padding.key_stride)
    return part


@triton.jit
def exists_unpadded(j, end, padding, EDGE: tl.constexpr):
    """Which keys `j` lie before `end` and are not padding; None: all of them."""
    keep = None
    if EDGE:
        keep = j < end
    if padding is not None:
        place = address(padding, j)
        seen = tl.load(place, mask=keep, other=0) if EDGE else tl.load(place)
        keep = seen != 0
    return keep


@triton.jit
def tanh(x):
    size = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    square = x * x  # near 0, where the line above loses digits, the Taylor series
    small = size * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    tanh_of_size = tl.where(size < 0.25, small, large)
    return tl.where(x < 0, -tanh_of_size, tanh_of_size)


@triton.jit
def score(products, i, j, keep, mod, CAUSAL: tl.constexpr, EDGE: tl.constexpr):
    """`(scores, slope)` of the products of queries `i` and keys `j`, of which one is a column and the other a row.

    `keep`, of the shape of `j`, says which keys exist (None: all). `slope` is d(score)/d(scaled product), of use with
    a softcap alone. Where EDGE is false, every query sees every key of the tile, but for the mask.
    """
    scores = products * mod.scoring.factor
    slope = scores
    if mod.scoring.cap is not None:
        bent = tanh(scores)
        slope = 1.0 - bent * bent
        scores = bent * mod.scoring.cap
    if mod.mask is not None:
        mask = mod.mask
        place = mask.base + i.to(tl.int64) * mask.query_stride + j.to(tl.int64) * mask.key_stride
        bias = tl.load(place, mask=(i < mask.queries) & (j < mask.keys), other=0)
        if bias.dtype == tl.uint8:
            scores = tl.where(bias != 0, scores, -INFINITY)
        else:
            bias = bias.to(tl.float32)
            scores = tl.where(bias <= HIDDEN, -INFINITY, scores + bias * LOG2E)  # NaN stays NaN
    if keep is not None:
        scores = tl.where(keep, scores, -INFINITY)
    if EDGE and CAUSAL:
        scores = tl.where(j <= i + mod.shift, scores, -INFINITY)
    if EDGE and mod.window is not None:
        scores = tl.where(j > i + mod.shift - mod.window, scores, -INFINITY)
    return scores, slope
