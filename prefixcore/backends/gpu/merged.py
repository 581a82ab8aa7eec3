"""The merged path: a vendor's kernel attends to the sequence, ours adds the prefix.

One softmax over both is exact, because either part depends on the other only through the output and the log-sum-exp:
forward, our kernel starts its online softmax from what the vendor's ended with; backward, the vendor's kernel is given
the merged output and log-sum-exp (Dao et al., arXiv:2205.14135; the identity that ring attention rests on).
"""

from __future__ import annotations

from torch import Tensor

from .kernels.forward import forward as absorb_prefix
from .kernels.grad_query import grad_query as add_grad_query
from .problem import Problem
from .vendor import Vendor


def forward(p: Problem, vendor: Vendor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of prefix and sequence, and of the sinks, which a vendor need not know about either."""
    out, lse = vendor.forward(p)
    if p.virtual_tokens or p.sinks is not None:
        absorb_prefix(p, out, lse, from_state=True)
    return out, lse


def backward(
    p: Problem, vendor: Vendor, grad_out: Tensor, out: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value. That of the prefix is the same kernel's on every path."""
    grad_query, grad_key, grad_value = vendor.backward(p, grad_out, out, lse)
    if p.virtual_tokens:
        add_grad_query(p, grad_out, lse, delta, grad_query, prefix_only=True)
    return grad_query, grad_key, grad_value
