"""Forward: one online softmax over the keys of the prefix, then those of the sequence.

The prefix is nothing but more keys. If another kernel has attended to the sequence, its output and log-sum-exp are a
state of the softmax (m = lse, l = 1, acc = output), and only the prefix is left to take in.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: E741  (l is the sum's name in the papers)

import triton
import triton.language as tl
from torch import Tensor

from ...problem import AttentionProblem
from . import launch
from .online_softmax import Keys, empty_state, update, update_sink
from .ranges import in_tiles, keys_seen
from .scores import ScoreMod, mask_of, padding_of
from .sequences import locate, prefix_of, tile_of_program
from .tiles import INFINITY, LN2, LOG2E, LOWEST, address, head_of, load_tile, store_tile


@triton.jit(do_not_specialize=["sizes", "window", "tiles"])
def forward_kernel(
    out, lse, query, key, value, prefix_key, prefix_value, bank, cu_seqlens, padding, mask, sinks, sizes, scoring,
    window, tiles, GROUP: tl.constexpr, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr, PREFIX: tl.constexpr, FROM_STATE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head."""
    batch, kv_head, head, tile = tile_of_program(tl.program_id(0), tiles, sizes, GROUP)
    sequence, first = locate(tile, batch, cu_seqlens, sizes, BLOCK_M)
    if first >= sequence.queries:
        return
    start = sequence.start
    last = tl.minimum(first + BLOCK_M, sequence.queries)
    i = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    exists = i < sequence.queries
    q = load_tile(head_of(query, batch, head, start), i, exists, HEAD_DIM, BLOCK_D, DTYPE)  # [BLOCK_M, BLOCK_D]
    o = head_of(out, batch, head, start)
    lse_at = address(head_of(lse, batch, head, start), i)  # [BLOCK_M]

    acc, m, l = empty_state(BLOCK_M, BLOCK_DV)  # [BLOCK_M, BLOCK_DV], [BLOCK_M], [BLOCK_M]
    if FROM_STATE:
        acc = load_tile(o, i, exists, VALUE_DIM, BLOCK_DV, tl.float32)
        m = tl.load(lse_at, mask=exists, other=-INFINITY)
        l = tl.where(tl.abs(m) == INFINITY, 0.0, 1.0)  # some kernels write +infinity where nothing is seen
        m = tl.where(l > 0, m * LOG2E, LOWEST)
    if sinks is not None:
        acc, m, l = update_sink(acc, m, l, tl.load(sinks + head))

    if PREFIX:
        entry, length = prefix_of(sequence.number, bank, sizes)
        keys = Keys(
            padding=None,
            key=head_of(prefix_key, entry, kv_head, entry * 0),
            value=head_of(prefix_value, entry, kv_head, entry * 0),
            tiles=in_tiles(entry * 0, entry * 0, length, length, BLOCK_N),
            score_mod=ScoreMod(scoring, mask=None, shift=0, window=None),
        )
        acc, m, l = update(acc, m, l, q, i, keys, HEAD_DIM, VALUE_DIM, BLOCK_N, CAUSAL=False)
    if not FROM_STATE:
        shift = sequence.keys - sequence.queries
        score_mod = ScoreMod(scoring, mask_of(mask, batch, head, sequence), shift, window)
        keys = Keys(
            padding=padding_of(padding, batch, start),
            key=head_of(key, batch, kv_head, start),
            value=head_of(value, batch, kv_head, start),
            tiles=keys_seen(first, last, shift, sequence.keys, window, BLOCK_N, CAUSAL),
            score_mod=score_mod,
        )
        acc, m, l = update(acc, m, l, q, i, keys, HEAD_DIM, VALUE_DIM, BLOCK_N, CAUSAL)

    sees = l != 0  # or NaN, which is left to be seen
    acc = acc / tl.where(sees, l, 1.0)[:, None]
    store_tile(o, i, exists, acc, VALUE_DIM)
    tl.store(lse_at, tl.where(sees, (m + tl.log2(tl.where(sees, l, 1.0))) * LN2, -INFINITY), mask=exists)


def launch_forward(p: AttentionProblem, out: Tensor, lse: Tensor, *, from_state: bool = False) -> None:
    """Writes `out` [B, H, T, Dv] and `lse` [B, H, T] (float32, natural log; -inf where a query sees nothing).

    Args:
        p: The arguments of the op.
        out: The output.
        lse: The log-sum-exp of the scores.
        from_state: `out` and `lse` hold attention over the sequence alone, of any kernel (where nothing is seen the
            lse may be either infinity): they are updated with the prefix, and with the sinks if there are any.
    """
    blocks = launch.blocks_for("from_state" if from_state else "forward", p)
    tiles = launch.tile_count(p, p.queries, blocks.block_m)
    launch.launch(
        forward_kernel, tiles * p.heads * p.batch, blocks, p.query,
        out=launch.view(out), lse=launch.view(lse), sinks=launch.contiguous(p.sinks), tiles=tiles,
        PREFIX=p.virtual_tokens > 0, FROM_STATE=from_state, **launch.arguments(p), **launch.constants(p, blocks),
    )  # fmt: skip
