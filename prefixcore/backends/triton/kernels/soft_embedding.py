"""The soft embedding: rows of the frozen table and of the virtual tokens by id, and the virtual tokens' gradient.

Nobody looks at the ids, for that would wait for the GPU. An id out of range reads nothing and its row becomes NaN, so
that whoever computes with it sees it; the backward passes over it.

Backward, a stable sort brings the places of each virtual token together, in the order of the ids; then each program
adds up the rows of one token in that order. No atomics, so the same bits come out on every run, and only the rows that
name a virtual token are read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import nvidia
from . import launch

STREAMED = nvidia.streamed_embedding()
"""Whether what is read once passes by the L1 cache, and what is stored is the first to leave the L2 cache."""
_TILES = {False: 2048, True: 4096}
"""Elements a program holds: two or, streamed, four wide loads a thread of what has two bytes. With eight programs on
each multiprocessor of an H200 four are 64 KiB under way there, and by Little's law 4.2 TB/s at 800 ns need 25; those
that wait for their ids leave the rest."""
_COLUMNS = 256
"""Of a row, a program's share at most: most hidden sizes are multiples of it, and it is read in wide loads."""


@triton.jit(do_not_specialize=["count", "vocabulary", "num_virtual"])
def gather_kernel(
    ids, weight, virtual, out,
    count, vocabulary, num_virtual, weight_stride, virtual_stride,
    HIDDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, STREAMED: tl.constexpr,
):  # fmt: skip
    """BLOCK_M places of the output, BLOCK_E columns."""
    COLUMN_BLOCKS: tl.constexpr = (HIDDEN + BLOCK_E - 1) // BLOCK_E
    program = tl.program_id(0).to(tl.int64)
    place = program // COLUMN_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = program % COLUMN_BLOCKS * BLOCK_E + tl.arange(0, BLOCK_E)  # [BLOCK_E]
    inside = column < HIDDEN

    token = tl.load(ids + place, mask=place < count, other=-1).to(tl.int64)
    row = token - vocabulary  # of the virtual tokens
    is_frozen = (token >= 0) & (token < vocabulary)
    is_virtual = (token >= vocabulary) & (row < num_virtual)

    frozen = tl.load(
        weight + token[:, None] * weight_stride + column[None, :],
        mask=is_frozen[:, None] & inside[None, :], other=float("nan"), cache_modifier=".cg" if STREAMED else "",
    )  # fmt: skip
    trained = tl.load(
        virtual + row[:, None] * virtual_stride + column[None, :],
        mask=is_virtual[:, None] & inside[None, :], other=0.0,
    ).to(frozen.dtype)  # fmt: skip
    found = tl.where(is_virtual[:, None], trained, frozen)  # [BLOCK_M, BLOCK_E]
    tl.store(
        out + place[:, None] * HIDDEN + column[None, :], found, mask=(place < count)[:, None] & inside[None, :],
        cache_modifier=".cs" if STREAMED else "",
    )  # fmt: skip


@triton.jit
def sum_kernel(
    grad, places, starts, grad_virtual, grad_stride,
    HIDDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The gradient of one virtual token, BLOCK_E columns: BLOCK_M partial sums side by side, added up at the end."""
    COLUMN_BLOCKS: tl.constexpr = (HIDDEN + BLOCK_E - 1) // BLOCK_E
    program = tl.program_id(0).to(tl.int64)
    row = program // COLUMN_BLOCKS
    column = program % COLUMN_BLOCKS * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = column < HIDDEN

    begin, end = tl.load(starts + row), tl.load(starts + row + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for first in range(begin, end, BLOCK_M):
        i = first + tl.arange(0, BLOCK_M)
        place = tl.load(places + i, mask=i < end, other=0)
        tile = tl.load(
            grad + place[:, None] * grad_stride + column[None, :],
            mask=(i < end)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        acc += tile.to(tl.float32)
    tl.store(grad_virtual + row * HIDDEN + column, tl.sum(acc, 0), mask=inside)


def gather(input_ids: Tensor, weight: Tensor, virtual: Tensor) -> Tensor:
    """The rows [..., E] that the ids [...] name, in the dtype of `weight` [V, E]; both tables with contiguous rows."""
    hidden = weight.shape[1]
    out = launch.empty(*input_ids.shape, hidden, like=weight)
    if out.numel():
        ids, blocks = input_ids.contiguous(), _blocks(hidden)
        launch.launch(
            gather_kernel, triton.cdiv(ids.numel(), blocks[0]) * triton.cdiv(hidden, blocks[1]), blocks, weight,
            ids=ids, weight=weight, virtual=virtual, out=out, count=ids.numel(), vocabulary=weight.shape[0],
            num_virtual=virtual.shape[0], weight_stride=weight.stride(0), virtual_stride=virtual.stride(0),
            HIDDEN=hidden, BLOCK_M=blocks[0], BLOCK_E=blocks[1], STREAMED=STREAMED,
        )  # fmt: skip
    return out


def grad_virtual(grad: Tensor, input_ids: Tensor, vocabulary: int, num_virtual: int) -> Tensor:
    """The gradient [N, E] of the virtual tokens, float32, from that of the output [..., E]."""
    hidden = grad.shape[-1]
    total = launch.empty(num_virtual, hidden, like=grad, dtype=torch.float32)
    if total.numel():
        rows, blocks = grad.contiguous().view(-1, hidden), _blocks(hidden)
        ids, places = input_ids.flatten().sort(stable=True)
        bounds = torch.arange(vocabulary, vocabulary + num_virtual + 1, dtype=ids.dtype, device=ids.device)
        launch.launch(
            sum_kernel, num_virtual * triton.cdiv(hidden, blocks[1]), blocks, grad,
            grad=rows, places=places, starts=torch.searchsorted(ids, bounds), grad_virtual=total,
            grad_stride=rows.stride(0), HIDDEN=hidden, BLOCK_M=blocks[0], BLOCK_E=blocks[1],
        )  # fmt: skip
    return total


def _blocks(hidden: int) -> launch.Blocks:
    """Places (or rows) and columns a program."""
    columns = min(_COLUMNS, triton.next_power_of_2(hidden))
    return launch.Blocks(_TILES[STREAMED] // columns, columns, 4, 1)
