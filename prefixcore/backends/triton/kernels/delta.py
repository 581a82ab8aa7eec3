"""delta = rowsum(dO * O) - d(lse): all that the backward of one part of the keys has to know of the others."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .tiles import Strided, address, head_of, load_tile, offsets_of

_BLOCK_M = 32


class Upstream(NamedTuple):
    """What comes into the backward: all of them [B, H, T] or [B, H, T, Dv], as `launch.View`.

    Attributes:
        grad_out: The gradient of the output.
        lse: The log-sum-exp of prefix and sequence together.
        delta: Of `compute_delta`; None: each tile of queries computes its own, from the next two.
        out: The output, or None.
        grad_lse: The gradient of the log-sum-exp, or None.
    """

    grad_out: Any
    lse: Any
    delta: Any
    out: Any
    grad_lse: Any


@triton.jit
def delta_of(upstream, batch, head, i, exists, do, VALUE_DIM: tl.constexpr):
    """delta of the queries `i` whose gradients are `do` [len(i), BLOCK_DV]."""
    if upstream.out is None:
        at = upstream.delta.data + offsets_of(upstream.delta, batch, head, i)
        delta = tl.load(at, mask=exists, other=0.0)
    else:
        at = offsets_of(upstream.out, batch, head, i)
        o = load_tile(Strided(upstream.out.data, 1), at, exists, VALUE_DIM, do.shape[1], tl.float32)
        delta = tl.sum(o * do.to(tl.float32), 1)
        if upstream.grad_lse is not None:
            at = upstream.grad_lse.data + offsets_of(upstream.grad_lse, batch, head, i)
            delta -= tl.load(at, mask=exists, other=0.0)
    return delta


@triton.jit(do_not_specialize=["heads", "queries"])
def delta_kernel(
    grad_out, out, grad_lse, delta, heads, queries, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head."""
    program, tiles = tl.program_id(0), tl.cdiv(queries, BLOCK_M)
    head, batch = program // tiles % heads, program // tiles // heads
    i = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    exists = i < queries
    origin = head * 0
    o_head = head_of(out, batch, head, origin)
    o = load_tile(o_head, i, exists, VALUE_DIM, BLOCK_DV, tl.float32)  # [BLOCK_M, BLOCK_DV]
    do_head = head_of(grad_out, batch, head, origin)
    do = load_tile(do_head, i, exists, VALUE_DIM, BLOCK_DV, tl.float32)  # [BLOCK_M, BLOCK_DV]
    sums = tl.sum(o * do, 1)  # [BLOCK_M]
    if grad_lse is not None:
        sums -= tl.load(address(head_of(grad_lse, batch, head, origin), i), mask=exists, other=0.0)
    tl.store(address(head_of(delta, batch, head, origin), i), sums, mask=exists)


def compute_delta(grad_out: Tensor, out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """`<grad_out, out> - grad_lse` of every query, [B, H, T] in float32.

    `grad_out` and `out` are [B, H, T, Dv], `grad_lse` is [B, H, T] or None. Dao et al., arXiv:2205.14135, appendix B.4;
    the log-sum-exp's own gradient adds `p * grad_lse` to d(score), which is the same as a smaller delta.
    """
    batch, heads, queries, dim = out.shape
    result = launch.empty(batch, heads, queries, like=out, dtype=torch.float32)
    launch.launch(
        delta_kernel, triton.cdiv(queries, _BLOCK_M) * batch * heads, launch.Blocks(_BLOCK_M, 0, 4, 1), out,
        grad_out=launch.view(grad_out), out=launch.view(out),
        grad_lse=None if grad_lse is None else launch.view(grad_lse), delta=launch.view(result),
        heads=heads, queries=queries, VALUE_DIM=dim, BLOCK_DV=launch.padded(dim), BLOCK_M=_BLOCK_M,
    )  # fmt: skip
    return result
