"""Two attentions over different keys become one: outputs and log-sum-exps merged in place, gradients added.

With the log-sum-exp L_a of one part and L_b of the other, and L = log(exp L_a + exp L_b):
    O = exp(L_a - L) O_a + exp(L_b - L) O_b.
Both kernels move each element once and compute next to nothing: they run at a copy's rate.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .tiles import INFINITY, LN2, LOG2E, LOWEST, at

_ROWS = 32
"""Rows a program; as rows of [B, T, H, D] memory are numbered they lie one after the other."""


@triton.jit
def place_of(row, heads, queries):
    """`(batch, head, query)` of row number `row` of [B, T, H, D] memory."""
    return row // (heads * queries), row % heads, row // heads % queries


@triton.jit
def load_rows(view, batch, head, query, exists, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One row for each `(batch, head, query)`, [len(head), BLOCK] in float32: zeros beyond DIM."""
    dims = tl.arange(0, BLOCK)
    place = at(view, batch, head, query)[:, None] + dims[None, :]
    return tl.load(place, mask=exists[:, None] & (dims[None, :] < DIM), other=0.0).to(tl.float32)


@triton.jit
def store_rows(view, batch, head, query, exists, rows, DIM: tl.constexpr):
    """Writes `rows` [len(head), BLOCK] where `load_rows` reads."""
    dims = tl.arange(0, rows.shape[1])
    place = at(view, batch, head, query)[:, None] + dims[None, :]
    tl.store(place, rows.to(view.data.dtype.element_ty), mask=exists[:, None] & (dims[None, :] < DIM))


@triton.jit
def load_score(view, batch, head, query, exists):
    """A log-sum-exp in units of log 2, and whether it is of anything: some kernels write +infinity where it is not."""
    lse = tl.load(at(view, batch, head, query), mask=exists, other=-INFINITY)
    sees = tl.abs(lse) != INFINITY
    return tl.where(sees, lse * LOG2E, LOWEST), sees


@triton.jit(do_not_specialize=["heads", "queries", "rows"])
def merge_kernel(
    out, lse, part, part_lse, sinks, heads, queries, rows, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of `out` and `lse`, with which those of `part` are merged, and the sinks."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    exists = row < rows
    batch, head, query = place_of(row, heads, queries)
    own, own_sees = load_score(lse, batch, head, query, exists)  # [ROWS]
    other, other_sees = load_score(part_lse, batch, head, query, exists)  # [ROWS]
    m = tl.maximum(own, other)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=exists, other=0.0).to(tl.float32) * LOG2E
        m = tl.maximum(m, sink)
    own_weight = tl.where(own_sees, tl.exp2(own - m), 0.0)
    other_weight = tl.where(other_sees, tl.exp2(other - m), 0.0)
    sum = own_weight + other_weight
    if sinks is not None:
        sum += tl.exp2(sink - m)
    sees = sum != 0  # or NaN, which is left to be seen
    scale = 1.0 / tl.where(sees, sum, 1.0)
    # What is seen by no query may be anything, and times 0 it has to be 0.
    a = load_rows(out, batch, head, query, exists & own_sees, DIM, BLOCK)  # [ROWS, BLOCK]
    b = load_rows(part, batch, head, query, exists & other_sees, DIM, BLOCK)  # [ROWS, BLOCK]
    merged = a * (own_weight * scale)[:, None] + b * (other_weight * scale)[:, None]
    store_rows(out, batch, head, query, exists, merged, DIM)
    merged_lse = tl.where(sees, (m + tl.log2(tl.where(sees, sum, 1.0))) * LN2, -INFINITY)
    tl.store(at(lse, batch, head, query), merged_lse, mask=exists)


@triton.jit(do_not_specialize=["heads", "queries", "rows"])
def add_kernel(total, part, heads, queries, rows, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """One program: ROWS rows of `total`, to which those of `part` are added."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    exists = row < rows
    batch, head, query = place_of(row, heads, queries)
    a = load_rows(total, batch, head, query, exists, DIM, BLOCK)  # [ROWS, BLOCK]
    b = load_rows(part, batch, head, query, exists, DIM, BLOCK)  # [ROWS, BLOCK]
    store_rows(total, batch, head, query, exists, a + b, DIM)


def launch_merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, sinks: Tensor | None = None) -> None:
    """Merges attention over other keys, and the sinks, into `out` [B, H, T, D] and `lse` [B, H, T], in place.

    Either part may see nothing: its log-sum-exp is an infinity there, and its output may be anything.

    Args:
        out: The output of one part, then of both.
        lse: Its log-sum-exp, natural and float32, then that of both: -inf where neither sees anything.
        part: The output of the other part, as `out` but for its strides.
        part_lse: The log-sum-exp of the other part, as `lse` but for its strides.
        sinks: One more logit a head, [H].
    """
    _launch(merge_kernel, out, lse=lse, part=part, part_lse=part_lse, sinks=launch.contiguous(sinks))


def launch_add(total: Tensor, part: Tensor) -> None:
    """`total += part` [B, H, T, D], whatever their strides: added in float32, rounded once."""
    _launch(add_kernel, total, part=part)


def _launch(kernel: object, written: Tensor, **others: Tensor | None) -> None:
    batch, heads, queries, dim = written.shape
    name = "out" if kernel is merge_kernel else "total"
    views = {
        name: launch.view(x) if x is not None and x.dim() > 1 else x for name, x in {name: written, **others}.items()
    }
    rows = batch * heads * queries
    launch.launch(
        kernel, triton.cdiv(rows, _ROWS), launch.Blocks(_ROWS, 0, 4, 1), written,
        heads=heads, queries=queries, rows=rows, DIM=dim, BLOCK=launch.padded(dim), ROWS=_ROWS, **views,
    )  # fmt: skip
