"""Which path computes a problem: the rules, small enough to read, with the reason in words.

* `merged`: PyTorch's fused attention on the sequence, ours on the prefix (`merged.py`);
* `single`: one launch of our own kernels, which can do everything (`single.py`);
* `decode`: the same for few queries, the keys split among the processors.

`PREFIXCORE_GPU_PATH` forces one for the whole process, `use_path` for a block of code. A path that was forced
and cannot do what it is asked raises; a backward that it has no answer for is done by the single path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ..forced import Forced
from ..problem import AttentionProblem
from . import fused_attention, recording
from .fused_attention import FusedAttention

PATHS = ("merged", "single", "decode")

# Thresholds: where the numbers of launches and of busy processors suggest; not tuned on a device.
DECODE_QUERIES = 16
"""Up to so many queries, there are more processors than blocks of queries: the keys are split instead."""
MERGED_KEYS = 512
"""Below so many keys, a second launch costs more than PyTorch's fused attention saves."""

_forced = Forced("path", os.environ.get("PREFIXCORE_GPU_PATH"))
recording.depends_on("the forced path", lambda: _forced.name)


class Path(NamedTuple):
    """A path's name, in words why it is the one, and whose kernel does the sequence's part if it is merged."""

    name: str
    why: str
    fused: FusedAttention | None = None


def forward(p: AttentionProblem) -> Path:
    """The path of the forward. ValueError if one was forced that cannot do it."""
    if _forced.name is not None:
        return _force(p)
    if p.queries <= DECODE_QUERIES and p.cu_seqlens is None:
        return Path("decode", f"{p.queries} queries, no more than {DECODE_QUERIES}")
    return _merged_or_single(p, training=False)


def backward(p: AttentionProblem, *, all_three: bool, grad_lse: bool) -> Path:
    """The path of the backward.

    `all_three`: query, key and value all want a gradient, which is what PyTorch's fused attention computes;
    `grad_lse`: the log-sum-exp has been used as well as the output.
    """
    if _forced.name not in (None, *PATHS):
        _force(p)
    if _forced.name not in (None, "merged"):
        return Path("single", "forced" if _forced.name == "single" else f"{_forced.name} has no backward")
    if grad_lse:
        return Path("single", "a gradient of the log-sum-exp comes in, which no fused attention takes")
    if not all_three:
        return Path("single", "not all of query, key and value want a gradient")
    return _merged_or_single(p, training=True)


def _merged_or_single(p: AttentionProblem, training: bool) -> Path:
    if p.keys < MERGED_KEYS and _forced.name is None:
        return Path("single", f"{p.keys} keys, fewer than {MERGED_KEYS}")
    kernel, reason = _fused_attention(p, training)
    if kernel is None:
        return Path("single", reason)
    return Path("merged", reason, kernel)


def _fused_attention(p: AttentionProblem, training: bool) -> tuple[FusedAttention | None, str]:
    """Whose kernel can do the sequence's part, and that in words; or None and why nobody's."""
    if reason := fused_attention.cannot(p):
        return None, reason
    kernel = fused_attention.preferred(p, training=training)
    if kernel is None:
        return None, f"PyTorch has no fused kernel with a log-sum-exp for {str(p.query.dtype).removeprefix('torch.')}"
    return kernel, f"{kernel.name} does the sequence"


def _force(p: AttentionProblem) -> Path:
    if _forced.name not in PATHS:
        raise ValueError(f"unknown path {_forced.name!r} (PREFIXCORE_GPU_PATH): use one of {PATHS}")
    if _forced.name == "decode" and p.cu_seqlens is not None:
        raise ValueError("the decode path was forced, but the rows are packed; stop forcing it, or force 'single'")
    if _forced.name != "merged":
        return Path(_forced.name, "forced")
    kernel, reason = _fused_attention(p, training=False)
    if kernel is None:
        raise ValueError(f"the merged path was forced, but {reason}; stop forcing it, or force 'single'")
    return Path("merged", f"forced; {reason}", kernel)


@contextmanager
def use_path(name: str | None) -> Iterator[None]:
    """Forces one path (see `PATHS`) inside a `with` block; `None` forces none.

    For the whole process while the block runs, as `prefixcore.use_backend`.
    """
    with _forced.within(name, PATHS):
        yield
