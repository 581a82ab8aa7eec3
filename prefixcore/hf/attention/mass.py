"""The share of attention that falls on the prefix, layer by layer, while a model runs.

The kernels never form attention weights, and need not: where every virtual token has the value 1 and every token of
the text the value 0, what attention returns is the share that the virtual tokens have of it, behind the same mask,
window and packing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _Watching(threading.local):
    def __init__(self) -> None:  # runs in each thread: compiled code is guarded by what an instance holds
        self.masses: dict[int, Tensor] | None = None


_watching = _Watching()


@contextmanager
def watch_mass() -> Iterator[dict[int, Tensor]]:
    """A block in which calls of this thread note the mass [B, T] on the prefix, the mean over heads, by layer."""
    before = _watching.masses
    masses = _watching.masses = {}
    try:
        yield masses
    finally:
        _watching.masses = before


def is_watching() -> bool:
    """Whether this thread notes masses; never in a compiled call, which would have to be compiled for it."""
    return not torch.compiler.is_compiling() and _watching.masses is not None


def note_mass(attend: Callable[[Tensor, Tensor], Tensor], layer: int, value: Tensor, prefix_value: Tensor) -> None:
    """Notes the mass of a call, in a thread that watches it.

    Args:
        attend: attention [B, H, T, Dv] of the call, given the values of the text and of the prefix.
        layer: which layer it is.
        value: [B, Hkv, S, Dv].
        prefix_value: [Hkv, P, Dv], or of a bank [N, Hkv, P, Dv].
    """
    assert _watching.masses is not None
    ones, zeros = torch.ones_like(prefix_value), torch.zeros_like(value)
    _watching.masses[layer] = attend(zeros, ones)[..., 0].float().mean(1)
