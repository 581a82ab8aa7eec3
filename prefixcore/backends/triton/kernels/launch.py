"""From tensors to launches: the kernels' arguments, block sizes, and the one place that launches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import AttentionProblem

INTERPRETED = triton.knobs.runtime.interpret
"""Triton's interpreter: there, bfloat16 arithmetic is done on raw bits, so tiles are widened when they are loaded."""

PROGRAMS = 264
"""How many programs split work is spread over: two for each of the 132 multiprocessors of an H100. A constant, not
the device's own number, so that sums are split alike, and come out alike, wherever they run."""


class View(NamedTuple):
    """A [B, H, T, D] tensor whose last dimension is contiguous, or a [B, H, T] one; strides count elements."""

    data: Tensor
    batch: int
    head: int
    row: int


class Mask(NamedTuple):
    data: Tensor
    batch: int
    head: int
    row: int
    key: int


class Padding(NamedTuple):
    data: Tensor
    batch: int
    key: int


class Bank(NamedTuple):
    """What says which prefix a sequence sees."""

    entry: Tensor | None
    lengths: Tensor | None


class Sizes(NamedTuple):
    """Triton 3.6 compiles a kernel anew when one of these first is 1, or a multiple of 16: in a tuple it does not heed
    ``do_not_specialize``."""

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
    rows: int
    keys: int
    warps: int
    stages: int


def view(x: Tensor) -> View:
    if x.dim() == 4 and x.shape[3] > 1 and x.stride(3) != 1:
        raise ValueError(f"the last dimension has to be contiguous, its stride is {x.stride(3)}: pass a .contiguous()")
    return View(x, x.stride(0), x.stride(1), x.stride(2))


def flat(x: Tensor | None) -> Tensor | None:
    """One number beside the other: what the kernels read without a stride."""
    return None if x is None else x.contiguous()


def arguments(p: AttentionProblem) -> dict[str, Any]:
    """What every attention kernel is told about the problem, under the names of its parameters."""
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
        "bank": Bank(flat(p.prefix_index), flat(p.prefix_lengths)), "starts": flat(p.cu_seqlens),
        "padding": None if padding is None else Padding(padding, *padding.stride()),
        "mask": None if mask is None else Mask(mask, *mask.stride()),
        "sizes": Sizes(p.kv_heads, p.queries, p.keys, p.virtual_tokens, p.sequences, p.bank[0].shape[0]),
        "scoring": Scoring(p.scale / p.softcap, p.softcap * log2e) if p.softcap else Scoring(p.scale * log2e, None),
        "window": p.window or None,
    }  # fmt: skip


def constants(p: AttentionProblem, blocks: Blocks) -> dict[str, Any]:
    """What is known when a kernel is compiled."""
    return {
        "GROUP": p.group, "CAUSAL": p.is_causal,
        "DIM": p.head_dim, "WIDTH": width(p.head_dim), "VALUE_DIM": p.value_dim, "VALUE_WIDTH": width(p.value_dim),
        "ROWS": blocks.rows, "KEYS": blocks.keys, "DTYPE": compute_dtype(p.query),
    }  # fmt: skip


def width(dim: int) -> int:
    """A head's size as the kernels compute it: a power of two that a matrix instruction takes."""
    return max(16, triton.next_power_of_2(dim))


def compute_dtype(x: Tensor) -> tl.dtype:
    if INTERPRETED and x.dtype == torch.bfloat16:
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype]


def tiles(p: AttentionProblem, length: int, tile: int) -> int:
    """Tiles of ``length`` rows or keys, all packed sequences together: as ``tiles.locate`` counts them."""
    return triton.cdiv(length, tile) if p.cu_seqlens is None else length // tile + p.sequences


# --- block sizes --------------------------------------------------------------------------------------

# By kernel, then (the wider head's size as computed, bytes an element): rows, keys, warps, stages. Chosen so that
# nothing spills and that the shared memory of sm_86 and sm_89 (99 KiB) holds it; not tuned on a device.
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
    "grad_short_prefix": {  # the keys are as many as the prefix has
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
}  # fmt: skip

# Where a family of devices does better with other blocks. Those of 90 were the fastest of ten on an H200, at
# B = 8, T = 2048 with P = 64 and 2048. For the gradients of keys and prefix at a head dim of 128 these spill a few
# registers, and still take half the time, or less, of the fastest that do not.
_FAMILIES = {
    ("forward", 90): {(64, 2): Blocks(128, 64, 8, 3), (128, 2): Blocks(128, 64, 8, 3)},
    ("from_state", 90): {(64, 2): Blocks(64, 32, 4, 2)},
    ("grad_query", 90): {(64, 2): Blocks(64, 64, 4, 3)},
    ("grad_keys", 90): {(64, 2): Blocks(32, 64, 4, 2), (128, 2): Blocks(32, 64, 4, 2)},
    ("grad_prefix", 90): {(64, 2): Blocks(64, 64, 4, 2), (128, 2): Blocks(64, 64, 4, 2)},
    ("grad_short_prefix", 90): {(64, 2): Blocks(64, 64, 4, 2), (128, 2): Blocks(32, 64, 4, 2)},
    ("decode_prefix", 90): {(128, 2): Blocks(64, 64, 4, 3)},
    ("grad_query", 100): {(128, 2): Blocks(64, 64, 8, 2)},
    ("grad_keys", 100): {(128, 2): Blocks(64, 64, 8, 1)},
}


def family(device: torch.device) -> int:
    """80 (Ampere, Ada), 90 (Hopper) or 100 (Blackwell). Blackwell's consumer cards (12) have an Ada's shared memory."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return 80 if major >= 12 else min(max(major, 8), 10) * 10


def blocks_for(kernel: str, p: AttentionProblem) -> Blocks:
    widest = max(p.head_dim, p.value_dim)
    if widest > 256:
        raise ValueError(
            f"expected head dims of at most 256 on a GPU, got {widest}; run the slow reference inside 'with "
            'prefixcore.use_backend("reference")\''
        )
    size = (max(64, width(widest)), p.query.element_size())
    chips = family(p.query.device)
    blocks = _FAMILIES.get((kernel, chips), {}).get(size) or _TABLE[kernel][size]
    if chips == 80 and p.prefix_key.element_size() > size[1]:  # a float32 prefix takes twice the shared memory
        blocks = blocks._replace(keys=max(16, blocks.keys // 2))
    if p.mask is not None:  # its tile is as large as that of the scores, and takes as many registers
        keys = max(16, blocks.keys // 2) if p.softcap else blocks.keys
        blocks = blocks._replace(rows=max(16, blocks.rows // 2), keys=keys, stages=1)
    return blocks


# --- launching ----------------------------------------------------------------------------------------


def launch(kernel: Any, programs: int, blocks: Blocks, on: Tensor, **arguments: Any) -> None:
    """Runs ``kernel`` on the device of ``on``, unless there is nothing to do."""
    if programs == 0:
        return
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
    with torch.cuda.device_of(on):
        kernel[(programs,)](**arguments, **options)
