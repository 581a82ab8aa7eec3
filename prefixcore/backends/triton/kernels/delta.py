"""delta = rowsum(dO * O) - d(lse): all that the backward of one part of the keys must know of the others."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .tiles import at, load_tile

_ROWS = 32


@triton.jit(do_not_specialize=["heads", "queries"])
def delta_kernel(
    grad_out, out, grad_lse, delta, heads, queries, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    program, tiles = tl.program_id(0), tl.cdiv(queries, ROWS)
    head, batch = program // tiles % heads, program // tiles // heads
    i = program % tiles * ROWS + tl.arange(0, ROWS)
    exists = i < queries
    origin = head * 0
    o = load_tile(at(out, batch, head, origin), i, out.row, exists, DIM, WIDTH, tl.float32)
    do = load_tile(at(grad_out, batch, head, origin), i, grad_out.row, exists, DIM, WIDTH, tl.float32)
    total = tl.sum(o * do, 1)
    if grad_lse is not None:
        address = at(grad_lse, batch, head, origin) + i.to(tl.int64) * grad_lse.row
        total -= tl.load(address, mask=exists, other=0.0)
    tl.store(at(delta, batch, head, origin) + i.to(tl.int64) * delta.row, total, mask=exists)


def delta(grad_out: Tensor, out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """``[B, H, T]`` float32: ``<grad_out, out> - grad_lse`` of every query.

    ``grad_out`` and ``out`` are [B, H, T, Dv], ``grad_lse`` [B, H, T] or None. Dao et al., arXiv:2205.14135,
    appendix B.4; the lse's own gradient adds ``p * grad_lse`` to d(score), which is the same as less delta.
    """
    batch, heads, queries, dim = out.shape
    result = torch.empty(batch, heads, queries, dtype=torch.float32, device=out.device)
    launch.launch(
        delta_kernel, triton.cdiv(queries, _ROWS) * batch * heads, launch.Blocks(_ROWS, 0, 4, 1), out,
        grad_out=launch.view(grad_out), out=launch.view(out),
        grad_lse=None if grad_lse is None else launch.view(grad_lse), delta=launch.view(result),
        heads=heads, queries=queries, DIM=dim, WIDTH=launch.width(dim), ROWS=_ROWS,
    )  # fmt: skip
    return result
