"""What the attention kernels share: finding their rows and keys, loading tiles, scores.

Scores are kept in units of log 2 (the products are multiplied by scale * log2(e)), so that a probability is one
exp2. A hidden key's score is -infinity. Rows are queries, counted from the first of their sequence; ``shift`` is how
far the keys' count runs ahead of the queries' (S - T: the last query stands at the last key).

An argument that is None is known at compile time, and what hangs on it is not compiled.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-1e30)  # below every score, yet finite: differences with it are defined
HIDDEN = tl.constexpr(-1e30)  # an additive mask at or below this hides the key


@triton.jit
def dot(a, b, total):
    """``total + a @ b`` in float32.

    float32 factors are split into three TF32 products (error about 2^-21): as plain float32 fused multiply-adds the
    gradients' tiles spill (296 bytes a thread on sm_90, 32 x 32, D = 64). At D = 256 it is the other way round.
    """
    PRECISION: tl.constexpr = "ieee" if max(a.shape[1], b.shape[1]) > 128 else "tf32x3"
    return tl.dot(a, b, total, input_precision=PRECISION)


# --- where the rows and keys lie --------------------------------------------------------------------


@triton.jit
def tile_of_program(tiles, sizes, GROUP: tl.constexpr):
    """``(batch, kv_head, head, tile)``: which of the ``tiles`` of queries of a head this program works on.

    Later tiles come first: with causal attention they see the most keys. The heads of a group, which read the same
    keys, stand side by side.
    """
    program = tl.program_id(0)
    tile = tiles - 1 - program // GROUP % tiles
    kv_head = program // (GROUP * tiles) % sizes.kv_heads
    return program // (GROUP * tiles * sizes.kv_heads), kv_head, kv_head * GROUP + program % GROUP, tile


@triton.jit
def clamp(x, low, high):
    """Nobody has looked at the values that say where rows lie; whatever they are, nothing outside is touched."""
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def span(sequence, starts, sizes):
    """``(start, length)`` of a packed sequence."""
    start = clamp(tl.load(starts + sequence), 0, sizes.queries).to(tl.int32)
    return start, clamp(tl.load(starts + sequence + 1), start, sizes.queries).to(tl.int32) - start


@triton.jit
def locate(tile, batch, starts, sizes, TILE: tl.constexpr):
    """``(sequence, start, queries, keys, first)``: which sequence tile number ``tile`` is of.

    A row of the batch is one sequence. A packed row holds several, and sequence n gets the tiles from
    ``starts[n] // TILE + n`` on: enough for it, and known without reading the lengths before a launch.
    """
    sequence = batch
    start = batch * 0
    queries, keys = sizes.queries, sizes.keys
    first = tile * TILE
    if starts is not None:
        low, high = start, start + sizes.sequences
        while high - low > 1:
            middle = (low + high) // 2
            after = tl.load(starts + middle).to(tl.int32) // TILE + middle > tile
            low, high = tl.where(after, low, middle), tl.where(after, middle, high)
        sequence = low
        start, queries = span(sequence, starts, sizes)
        keys = queries
        first = tl.maximum(tile - start // TILE - sequence, 0) * TILE
    return sequence, start, queries, keys, first


@triton.jit
def length_of(entry, bank, sizes):
    """How many virtual tokens of an entry of the bank count."""
    length = sizes.virtual_tokens
    if bank.lengths is not None:
        length = clamp(tl.load(bank.lengths + entry), 0, sizes.virtual_tokens).to(tl.int32)
    return length


@triton.jit
def prefix_of(sequence, bank, sizes):
    """``(entry, length)``: the entry of the bank that a sequence sees, and how many virtual tokens of it."""
    entry = sequence * 0
    length = length_of(entry, bank, sizes)
    if bank.entry is not None:
        named = tl.load(bank.entry + sequence)
        entry = clamp(named, 0, sizes.entries - 1).to(tl.int32)
        length = tl.where(named < 0, 0, length_of(entry, bank, sizes))
    return entry, length


@triton.jit
def at(view, batch, head, row):
    """The address of a row of a [B, H, T, D] tensor."""
    return view.data + batch.to(tl.int64) * view.batch + head.to(tl.int64) * view.head + row.to(tl.int64) * view.row


@triton.jit
def padding_of(padding, batch, start):
    """``(address, stride)`` of a sequence's padding, or None."""
    place = None
    if padding is not None:
        place = (padding.data + batch.to(tl.int64) * padding.batch + start.to(tl.int64) * padding.key, padding.key)
    return place


@triton.jit
def mask_of(mask, batch, head, start, queries, keys):
    """``(address, row stride, key stride, rows, keys)`` of a sequence's mask, or None."""
    place = None
    if mask is not None:
        address = at(mask, batch, head, start) + start.to(tl.int64) * mask.key
        place = (address, mask.row, mask.key, queries, keys)
    return place


@triton.jit
def in_tiles(begin, whole_begin, whole_end, end, TILE: tl.constexpr):
    """Splits ``[begin, end)`` into tiles: ``(whole_begin, whole, left, edges)``.

    The ``whole`` tiles from ``whole_begin`` on lie inside the range given; the ``edges`` are ``left`` tiles from
    ``begin`` on, and the rest after the whole ones.
    """
    left = tl.cdiv(tl.maximum(tl.minimum(whole_begin, end) - begin, 0), TILE)
    whole_begin = begin + left * TILE
    whole = tl.maximum(tl.minimum(whole_end, end) - whole_begin, 0) // TILE
    right = tl.cdiv(tl.maximum(end - whole_begin - whole * TILE, 0), TILE)
    return whole_begin, whole, left, left + right


@triton.jit
def tile_start(n, begin, whole, left, TILE: tl.constexpr, EDGE: tl.constexpr):
    """Where tile ``n`` starts: edges step over the whole tiles between them."""
    start = begin + n * TILE
    if EDGE:
        start += tl.where(n < left, 0, whole * TILE)
    return start


@triton.jit
def keys_seen(first, last, shift, keys, window, TILE: tl.constexpr, CAUSAL: tl.constexpr):
    """``(begin, *in_tiles)`` of the keys that queries ``[first, last)`` see; whole tiles are seen by all of them."""
    begin, end = keys * 0, keys
    whole_begin, whole_end = begin, keys
    if CAUSAL:
        end = tl.maximum(tl.minimum(keys, last + shift), 0)
        whole_end = tl.minimum(keys, first + shift + 1)
    if window is not None:
        begin = tl.maximum(first + shift - window + 1, 0)
        whole_begin = tl.maximum(last + shift - window, 0)
    whole_begin, whole, left, edges = in_tiles(begin, whole_begin, whole_end, end, TILE)
    return begin, end, whole_begin, whole, left, edges


@triton.jit
def queries_seeing(first, last, shift, queries, window, TILE: tl.constexpr, CAUSAL: tl.constexpr):
    """As :func:`keys_seen`, of the queries that see keys ``[first, last)``."""
    begin, end = queries * 0, queries
    whole_begin, whole_end = begin, queries
    if CAUSAL:
        begin = tl.minimum(tl.maximum(first - shift, 0), queries)
        whole_begin = tl.maximum(last - 1 - shift, 0)
    if window is not None:
        end = tl.maximum(tl.minimum(queries, last - 1 + window - shift), begin)
        whole_end = tl.minimum(queries, first + window - shift)
    whole_begin, whole, left, edges = in_tiles(begin, whole_begin, whole_end, end, TILE)
    return begin, end, whole_begin, whole, left, edges


# --- tiles ------------------------------------------------------------------------------------------


@triton.jit
def load_tile(base, rows, stride, keep, DIM: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """``[rows, WIDTH]`` of rows that lie ``stride`` apart: zeros beyond DIM, and where ``keep`` (or None) is false."""
    dims = tl.arange(0, WIDTH)
    address = base + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    if keep is None:
        tile = tl.load(address) if DIM == WIDTH else tl.load(address, mask=dims[None, :] < DIM, other=0.0)
    elif DIM == WIDTH:
        tile = tl.load(address, mask=keep[:, None], other=0.0)
    else:
        tile = tl.load(address, mask=keep[:, None] & (dims[None, :] < DIM), other=0.0)
    return tile.to(DTYPE)


@triton.jit
def store_tile(base, rows, stride, keep, tile, DIM: tl.constexpr, WIDTH: tl.constexpr):
    dims = tl.arange(0, WIDTH)
    address = base + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    tl.store(address, tile.to(base.dtype.element_ty), mask=keep[:, None] & (dims[None, :] < DIM))


@triton.jit
def kept(j, end, padding, EDGE: tl.constexpr):
    """Which keys of a tile exist and are not padding; None: all of them."""
    keep = None
    if EDGE:
        keep = j < end
    if padding is not None:
        base, stride = padding
        address = base + j.to(tl.int64) * stride
        seen = tl.load(address, mask=keep, other=0) if EDGE else tl.load(address)
        keep = seen != 0
    return keep


@triton.jit
def load_log_sum_exp(lse, rows, stride, keep):
    """In units of log 2. Rows that see nothing get +infinity: probability 0."""
    lse = tl.load(lse + rows.to(tl.int64) * stride, mask=keep, other=INFINITY)
    return tl.where(tl.abs(lse) == INFINITY, INFINITY, lse * LOG2E)


@triton.jit
def load_statistics(lse, rows, lse_row, delta, delta_rows, delta_row, keep):
    """lse in units of log 2, and delta, of a tile's rows."""
    delta = tl.load(delta + delta_rows.to(tl.int64) * delta_row, mask=keep, other=0.0)
    return load_log_sum_exp(lse, rows, lse_row, keep), delta


# --- scores -----------------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    size = tl.abs(x)
    big = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    square = x * x  # below, by its series: there the line above loses digits
    small = size * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    tanh_of_size = tl.where(size < 0.25, small, big)
    return tl.where(x < 0, -tanh_of_size, tanh_of_size)


@triton.jit
def finish_scores(
    products, i, j, keep, mask, scoring, shift, window, CAUSAL: tl.constexpr, EDGE: tl.constexpr
):  # fmt: skip
    """``(scores, slope)``: from products of queries ``i`` and keys ``j`` (one a row, the other a column) to scores.

    ``slope`` is d(score)/d(scaled product), for the softcap alone.
    """
    scores = products * scoring.factor
    slope = scores
    if scoring.cap is not None:
        bent = tanh(scores)
        slope = 1.0 - bent * bent
        scores = bent * scoring.cap
    if mask is not None:
        base, row_stride, key_stride, queries, keys = mask
        address = base + i.to(tl.int64) * row_stride + j.to(tl.int64) * key_stride
        bias = tl.load(address, mask=(i < queries) & (j < keys), other=0)
        if bias.dtype == tl.uint8:
            scores = tl.where(bias != 0, scores, -INFINITY)
        else:
            bias = bias.to(tl.float32)
            scores = tl.where(bias > HIDDEN, scores + bias * LOG2E, -INFINITY)
    if keep is not None:
        scores = tl.where(keep, scores, -INFINITY)
    if EDGE and CAUSAL:
        scores = tl.where(j <= i + shift, scores, -INFINITY)
    if EDGE and window is not None:
        scores = tl.where(j > i + shift - window, scores, -INFINITY)
    return scores, slope
