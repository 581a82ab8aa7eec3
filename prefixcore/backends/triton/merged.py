"""The merged path: PyTorch's fused attention attends to the sequence, ours adds the prefix.

One softmax over both is exact, because either part depends on the other only through the output and the log-sum-exp:
forward, our kernel starts its online softmax from what PyTorch's ended with; backward, PyTorch's backward is given
the merged output and log-sum-exp (Dao et al., arXiv:2205.14135; the identity that ring attention rests on).
"""

from __future__ import annotations

from torch import Tensor

from ..problem import AttentionProblem
from . import single
from .fused_attention import FusedAttention
from .kernels import grad_short_prefix
from .kernels.delta import compute_delta
from .kernels.forward import launch_forward
from .kernels.grad_query import launch_grad_query


def forward(p: AttentionProblem, fused: FusedAttention) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of prefix and sequence, and of the sinks, which PyTorch's need not know about either."""
    out, lse = fused.forward(p)
    if p.virtual_tokens or p.sinks is not None:
        launch_forward(p, out, lse, from_state=True)
    return out, lse


def backward(
    p: AttentionProblem, fused: FusedAttention, grad_out: Tensor, out: Tensor, lse: Tensor, *, needs_prefix: bool
) -> tuple[Tensor, ...]:
    """All five gradients; where the prefix's are not needed, two empty tensors in their place."""
    sequence = fused.backward(p, grad_out, out, lse)
    if needs_prefix and grad_short_prefix.fits(p):
        of_bank = grad_short_prefix.launch_grad_short_prefix(p, grad_out, out, lse, sequence[0])
        return *sequence, *single.as_prefix(p, of_bank)
    delta = compute_delta(grad_out, out, None)
    if p.virtual_tokens:
        launch_grad_query(p, grad_out, lse, delta, sequence[0], prefix_only=True)
    return *sequence, *(single.grad_prefix(p, grad_out, lse, delta) if needs_prefix else single.unwanted(p)[3:])
