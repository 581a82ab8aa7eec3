"""From tensors to launches: the kernels' arguments, block sizes, and the one place that launches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import AttentionProblem
from .. import recording
from ..recording import Measured, call, empty

__all__ = ["call", "empty"]  # passed on to the kernels' launchers

INTERPRETED = triton.knobs.runtime.interpret
"""Whether Triton's interpreter runs the kernels. It does bfloat16 arithmetic on raw bits, so tiles become float32."""

PROGRAMS = 264
"""How many programs work is split into: two for each of the 132 multiprocessors of an H100. A constant, not the
device's own number, so that sums are split in the same way, and have the same bits, on every device."""


class View(NamedTuple):
    """A [B, H, T, D] tensor whose last dimension is contiguous, or a [B, H, T] one; strides count elements."""

    data: Tensor
    batch_stride: int
    head_stride: int
    row_stride: int


class Mask(NamedTuple):
    """[B, H, T, S], bool as uint8, or additive."""

    data: Tensor
    batch_stride: int
    head_stride: int
    row_stride: int
    key_stride: int


class Padding(NamedTuple):
    """[B, S], bool as uint8."""

    data: Tensor
    batch_stride: int
    key_stride: int


class Bank(NamedTuple):
    """Which entry of the bank each sequence sees (None: the one that there is), and how long each entry is."""

    prefix_index: Tensor | None
    prefix_lengths: Tensor | None


class Sizes(NamedTuple):
    """The sizes of a problem.

    Triton 3.6 ignores `do_not_specialize` inside a tuple: it compiles a kernel again where one of these is 1 for the
    first time, or a multiple of 16.
    """

    kv_heads: int
    queries: int
    keys: int
    virtual_tokens: int
    sequences: int
    entries: int


class Scoring(NamedTuple):
    """score = products * factor; with a softcap tanh(products * factor) * cap. In units of log 2."""

    factor: float
    cap: float | None


class Blocks(NamedTuple):
    """A tile is `block_m` queries by `block_n` keys; a program has `warps` warps and a pipeline of `stages` stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def view(x: Tensor) -> View:
    """`x` with its strides. ValueError if its last dimension is not contiguous."""
    if x.dim() == 4 and x.shape[3] > 1 and x.stride(3) != 1:
        raise ValueError(f"the last dimension has to be contiguous, its stride is {x.stride(3)}: pass a .contiguous()")
    return View(x, x.stride(0), x.stride(1), x.stride(2))


def contiguous(x: Tensor | None) -> Tensor | None:
    """`x` as the kernels read it without a stride."""
    return None if x is None else x.contiguous()


def arguments(p: AttentionProblem) -> dict[str, Any]:
    """The arguments that the attention kernels have in common, by the names of their parameters."""
    prefix_key, prefix_value = p.bank
    padding, mask = p.padding, p.mask
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    if padding is not None:
        padding = padding.view(torch.uint8)
    log2e = math.log2(math.e)
    return {
        "query": view(p.query), "key": view(p.key), "value": view(p.value),
        "prefix_key": view(prefix_key), "prefix_value": view(prefix_value),
        "bank": Bank(contiguous(p.prefix_index), contiguous(p.prefix_lengths)), "cu_seqlens": contiguous(p.cu_seqlens),
        "padding": None if padding is None else Padding(padding, *padding.stride()),
        "mask": None if mask is None else Mask(mask, *mask.stride()),
        "sizes": Sizes(p.kv_heads, p.queries, p.keys, p.virtual_tokens, p.sequences, p.bank[0].shape[0]),
        "scoring": Scoring(p.scale / p.softcap, p.softcap * log2e) if p.softcap else Scoring(p.scale * log2e, None),
        "window": p.window or None,
    }  # fmt: skip


def constants(p: AttentionProblem, blocks: Blocks) -> dict[str, Any]:
    """The compile-time constants that the attention kernels have in common, by the names of their parameters."""
    return {
        "GROUP": p.group, "CAUSAL": p.is_causal,
        "HEAD_DIM": p.head_dim, "BLOCK_D": padded(p.head_dim),
        "VALUE_DIM": p.value_dim, "BLOCK_DV": padded(p.value_dim),
        "BLOCK_M": blocks.block_m, "BLOCK_N": blocks.block_n, "DTYPE": compute_dtype(p.query),
    }  # fmt: skip


def padded(dim: int) -> int:
    """The width of a tile for a head dim: a power of two that a matrix instruction takes."""
    return max(16, triton.next_power_of_2(dim))


def compute_dtype(x: Tensor) -> tl.dtype:
    """The dtype of the factors of matrix products."""
    if INTERPRETED and x.dtype == torch.bfloat16:
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype]


def tile_count(p: AttentionProblem, length: int, block: int) -> int:
    """How many tiles `length` queries or keys of a batch row make, counted as `sequences.locate` does."""
    return triton.cdiv(length, block) if p.cu_seqlens is None else length // block + p.sequences


# --- block sizes --------------------------------------------------------------------------------------

# By kernel, then (the wider head dim, padded; bytes an element). Chosen so that nothing spills and that the shared
# memory of sm_86 and sm_89 (99 KiB) holds it; not tuned on a device.
_TABLE = {
    "forward": {
        (64, 2): Blocks(128, 64, 8, 2), (128, 2): Blocks(128, 64, 8, 2), (256, 2): Blocks(64, 32, 8, 2),
        (64, 4): Blocks(32, 32, 8, 1), (128, 4): Blocks(32, 32, 8, 1), (256, 4): Blocks(16, 16, 8, 1),
    },
    "from_state": {
        (64, 2): Blocks(128, 64, 8, 2), (128, 2): Blocks(64, 64, 4, 2), (256, 2): Blocks(64, 32, 8, 2),
        (64, 4): Blocks(32, 32, 8, 1), (128, 4): Blocks(32, 32, 8, 1), (256, 4): Blocks(16, 16, 8, 1),
    },
    "grad_query": {
        (64, 2): Blocks(128, 64, 8, 2), (128, 2): Blocks(64, 64, 4, 2), (256, 2): Blocks(32, 32, 8, 1),
        (64, 4): Blocks(32, 32, 8, 1), (128, 4): Blocks(16, 32, 4, 1), (256, 4): Blocks(16, 16, 8, 1),
    },
    "grad_keys": {
        (64, 2): Blocks(32, 128, 8, 2), (128, 2): Blocks(32, 64, 8, 2), (256, 2): Blocks(32, 32, 8, 1),
        (64, 4): Blocks(32, 32, 8, 1), (128, 4): Blocks(16, 16, 4, 1), (256, 4): Blocks(16, 16, 8, 1),
    },
    "grad_prefix": {
        (64, 2): Blocks(32, 64, 8, 2), (128, 2): Blocks(32, 64, 8, 2), (256, 2): Blocks(32, 32, 8, 1),
        (64, 4): Blocks(32, 32, 8, 1), (128, 4): Blocks(16, 16, 4, 1), (256, 4): Blocks(16, 16, 8, 1),
    },
    "grad_short_prefix": {  # block_n is replaced by the prefix's length, padded
        (64, 2): Blocks(32, 64, 4, 2), (128, 2): Blocks(32, 64, 8, 2), (64, 4): Blocks(32, 64, 8, 1),
        (128, 4): Blocks(16, 64, 8, 1),
    },
    "decode_prefix": {
        (64, 2): Blocks(64, 64, 4, 3), (128, 2): Blocks(64, 64, 4, 2), (256, 2): Blocks(32, 32, 8, 1),
        (64, 4): Blocks(32, 32, 8, 1), (128, 4): Blocks(32, 32, 8, 1), (256, 4): Blocks(16, 16, 8, 1),
    },
    "decode_sequence": {
        (64, 2): Blocks(16, 64, 4, 3), (128, 2): Blocks(16, 64, 4, 2), (256, 2): Blocks(16, 32, 4, 2),
        (64, 4): Blocks(16, 32, 4, 1), (128, 4): Blocks(16, 32, 4, 1), (256, 4): Blocks(16, 16, 8, 1),
    },
    "grad_once": {  # rows of what is summed over, then of whose gradient it is
        (64, 2): Blocks(32, 32, 4, 2), (128, 2): Blocks(32, 32, 4, 2), (256, 2): Blocks(32, 32, 8, 1),
        (64, 4): Blocks(32, 32, 8, 1), (128, 4): Blocks(16, 16, 4, 1), (256, 4): Blocks(16, 16, 8, 1),
    },
    "decode_once": {  # block_m is that of a shared program: own ones have as few queries as there are
        (64, 2): Blocks(64, 64, 4, 2), (128, 2): Blocks(64, 32, 4, 4), (256, 2): Blocks(32, 32, 8, 1),
        (64, 4): Blocks(32, 32, 8, 1), (128, 4): Blocks(32, 32, 8, 1), (256, 4): Blocks(16, 16, 8, 1),
    },
}  # fmt: skip

# Where a family of devices does better with other blocks. Those of 90 are the fastest of ten on an H200, at B = 8,
# T = 2048 with P = 64 and 2048. For the gradients of keys and prefix at a head dim of 128 they spill a few registers,
# and still take half the time, or less, of the fastest that do not.
_FAMILIES = {
    ("forward", 90): {(64, 2): Blocks(128, 64, 8, 3), (128, 2): Blocks(128, 64, 8, 3)},
    ("from_state", 90): {(64, 2): Blocks(64, 32, 4, 2)},
    ("grad_query", 90): {(64, 2): Blocks(64, 64, 4, 3)},
    ("grad_keys", 90): {(64, 2): Blocks(32, 64, 4, 2), (128, 2): Blocks(32, 64, 4, 2)},
    ("grad_prefix", 90): {(64, 2): Blocks(64, 64, 4, 2), (128, 2): Blocks(64, 64, 4, 2)},
    ("grad_short_prefix", 90): {(64, 2): Blocks(64, 64, 4, 2), (128, 2): Blocks(32, 64, 4, 2)},
    ("decode_prefix", 90): {(128, 2): Blocks(64, 64, 4, 3)},
    # Consumer Blackwell, whose compiler spills up to 48 bytes a thread of sm_80's blocks.
    ("from_state", 120): {(128, 2): Blocks(64, 32, 4, 2)},
    ("grad_query", 120): {(128, 2): Blocks(64, 32, 4, 2)},
    ("decode_once", 120): {(128, 2): Blocks(32, 32, 4, 4)},
    ("grad_query", 100): {(128, 2): Blocks(64, 64, 8, 2)},
    ("grad_keys", 100): {(128, 2): Blocks(64, 64, 8, 1)},
}


def family(device: torch.device) -> int:
    """80 (Ampere, Ada), 90 (Hopper), 100 (Blackwell) or 120 (consumer Blackwell, with the shared memory of Ada)."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return 120 if major >= 12 else min(max(major, 8), 10) * 10


def blocks_for(kernel: str, p: AttentionProblem) -> Blocks:
    """The block sizes of `kernel`, a key of the table, for a problem. ValueError for head dims that no kernel has."""
    widest = max(p.head_dim, p.value_dim)
    if widest > 256:
        raise ValueError(
            f"expected head dims of at most 256 on a GPU, got {widest}; run the slow reference inside 'with "
            'prefixcore.use_backend("reference")\''
        )
    size = (max(64, padded(widest)), p.query.element_size())
    chips = family(p.query.device)
    blocks = _FAMILIES.get((kernel, chips), {}).get(size) or _TABLE[kernel][size]
    if chips in (80, 120) and p.prefix_key.element_size() > size[1]:  # a float32 prefix takes twice the shared memory
        blocks = blocks._replace(block_n=max(16, blocks.block_n // 2))
    if p.mask is not None:  # its tile is as large as that of the scores, and takes as many registers
        block_n = max(16, blocks.block_n // 2) if p.softcap else blocks.block_n
        blocks = blocks._replace(block_m=max(16, blocks.block_m // 2), block_n=block_n, stages=1)
    return blocks


# --- launching ----------------------------------------------------------------------------------------


def launch(kernel: Any, programs: int, blocks: Blocks, on: Tensor, keys_of: Any = None, **arguments: Any) -> None:
    """Runs `programs` programs of `kernel` on the device of `on`, if there are any.

    Tensors stand among the arguments themselves or in their tuples, as views of what `empty` gave or of the op's own
    arguments. All else is a constant of the signature; with `keys_of`, the op's `key`, but for the number of keys and
    the strides of what has one entry a key, on which nothing else depends except by `length_bucket`.
    """
    if programs == 0:
        return
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
    with torch.cuda.device_of(on):
        if recording.here.recorder is None:
            kernel[(programs,)](**arguments, **options)
        else:
            measured = None if keys_of is None else _measured(arguments, keys_of)
            recording.here.recorder.launch(kernel, programs, arguments, options, measured)


def length_bucket(keys: int) -> int:
    """`keys` rounded up to a multiple of 64, or if more than 512 of an eighth of the power of two that is not above it.

    A cache grows with each token. What is decided by this number alone is decided anew every 64 tokens or more, and
    the work is split almost as evenly. `csrc/launch/length.h` has its twin.
    """
    step = max(64, (1 << max(keys.bit_length() - 1, 0)) // 8)
    return triton.cdiv(keys, step) * step


def _measured(arguments: dict[str, Any], keys_of: Tensor) -> dict[str, Any]:
    """Which of the arguments of a launch follow the number of keys: a `Measured` in the place of each such number."""
    found: dict[str, Any] = {}
    for name in ("key", "value", "padding", "mask"):
        view = arguments.get(name)  # a tensor, then its strides from the first dimension on
        if view is not None:
            found[name] = (None, *(Measured(view.data, "stride", dim) for dim in range(len(view) - 1)))
    keys = Measured(keys_of, "size", 2)
    found["sizes"] = tuple(keys if name == "keys" else None for name in Sizes._fields)
    return found
