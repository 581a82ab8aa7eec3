"""How outputs and gradients lie in memory: the same from every backend, for `torch.compile` is told once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


def empty_heads_last(x: Tensor, dim: int) -> Tensor:
    """Memory [B, T, H, dim] for what belongs to `x` [B, H, T, any]: transposing it back is free."""
    batch, heads, length, _ = x.shape
    return x.new_empty(batch, length, heads, dim).transpose(1, 2)


def heads_last(x: Tensor) -> Tensor:
    """`x` itself where it is laid out as [B, T, H, D], as it is if the query came from a transformer."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _heads_outside(x: Tensor) -> bool:
    return x.stride(1) > x.stride(2) or x.stride(3) != 1


def empty_gradient(x: Tensor) -> Tensor:
    """Memory for the gradient of `x` [B, H, T, D], with the heads where they are in `x`, outside the tokens or inside:
    autograd copies any other order.
    """
    return x.new_empty(x.shape) if _heads_outside(x) else empty_heads_last(x, x.shape[3])


def as_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """`grad` laid out as `empty_gradient(x)` is: itself where it is so already."""
    return grad.contiguous() if _heads_outside(x) else heads_last(grad)


class _Here(threading.local):
    free: bool = False


_here = _Here()


@contextmanager
def free_strides() -> Iterator[None]:
    """A block in which gradients may have any strides: autograd takes them as they are, compiled code does not."""
    before, _here.free = _here.free, True
    try:
        yield
    finally:
        _here.free = before


def strides_are_free() -> bool:
    """Whether this thread is inside `free_strides`: then a gradient may be a view of something larger."""
    return _here.free
