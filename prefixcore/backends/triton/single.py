"""The single path: prefix and sequence in one launch of our own kernels, for everything that PyTorch's cannot do.

Each function allocates what a kernel writes, laid out as the op promises, and has the kernel write it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import empty_gradient, empty_heads_last
from ..problem import AttentionProblem
from .kernels.decode import launch_decode
from .kernels.decode_once import launch_decode_once
from .kernels.forward import launch_forward
from .kernels.grad_keys import launch_grad_keys
from .kernels.grad_once import launch_grad_once
from .kernels.grad_prefix import launch_grad_prefix
from .kernels.grad_query import launch_grad_query
from .recording import empty


def outputs(p: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Memory for output and log-sum-exp."""
    return empty_heads_last(p.query, p.value_dim), empty(*p.query.shape[:3], like=p.query, dtype=torch.float32)


def forward(p: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    out, lse = outputs(p)
    launch_forward(p, out, lse)
    return out, lse


def decode(p: AttentionProblem) -> tuple[Tensor, Tensor]:
    """The same for few queries over many keys, which are split among the processors."""
    out, lse = outputs(p)
    launch_decode(p, out, lse)
    return out, lse


def decode_once(p: AttentionProblem) -> tuple[Tensor, Tensor]:
    """`decode` in one launch."""
    out, lse = outputs(p)
    launch_decode_once(p, out, lse)
    return out, lse


def unwanted(p: AttentionProblem) -> list[Tensor]:
    """What the op returns for gradients that nobody wants: five empty tensors."""
    return [empty(0, like=p.query, dtype=dtype) for dtype in (*[p.query.dtype] * 3, *[torch.float32] * 2)]


def no_gradient(p: AttentionProblem, needs_query: bool, needs_sequence: bool, needs_prefix: bool) -> tuple[Tensor, ...]:
    """All gradients where there is no query."""
    grads = unwanted(p)
    if needs_query:
        grads[0] = empty_gradient(p.query)
    if needs_sequence:
        grads[1], grads[2] = empty_gradient(p.key).zero_(), empty_gradient(p.value).zero_()
    if needs_prefix:
        grads[3:] = (torch.zeros_like(x, dtype=torch.float32) for x in (p.prefix_key, p.prefix_value))
    return tuple(grads)


def grad_query(p: AttentionProblem, grad_out: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    grad = empty_gradient(p.query)
    launch_grad_query(p, grad_out, lse, delta, grad)
    return grad


def grad_sequence(p: AttentionProblem, grad_out: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of key and value."""
    grad_key, grad_value = empty_gradient(p.key), empty_gradient(p.value)
    launch_grad_keys(p, grad_out, lse, delta, grad_key, grad_value)
    return grad_key, grad_value


def grad_prefix(p: AttentionProblem, grad_out: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the prefix, in its own shape, float32."""
    return as_prefix(p, launch_grad_prefix(p, grad_out, lse, delta))


def grad_once(
    p: AttentionProblem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *,
    needs_query: bool, needs_sequence: bool, needs_prefix: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """All five gradients in one launch, or two; empty tensors for those that are not needed."""
    grads = unwanted(p)
    wanted: list[Tensor | None] = [None, None, None]
    if needs_query:
        grads[0] = wanted[0] = empty_gradient(p.query)
    if needs_sequence:
        grads[1], grads[2] = wanted[1:] = empty_gradient(p.key), empty_gradient(p.value)
    of_bank = launch_grad_once(p, grad_out, out, lse, grad_lse, *wanted, needs_prefix=needs_prefix)
    if of_bank is not None:
        grads[3:] = as_prefix(p, of_bank)
    return tuple(grads)


def as_prefix(p: AttentionProblem, of_bank: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of a bank in the shape of the prefix."""
    return of_bank[0].reshape(p.prefix_key.shape), of_bank[1].reshape(p.prefix_value.shape)
