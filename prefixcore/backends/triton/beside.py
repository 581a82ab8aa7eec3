"""The fa4 path: prefix and sequence laid side by side, and one causal call of FlashAttention-4 over both.

Aligned bottom-right, a query sees all of the prefix and of its sequence what is not after it: nothing but causal
attention over longer rows. Laying keys and values out moves them once, a few percent of the call's time. Backward,
the gradients of the sequence are a view of what FlashAttention-4 gives, those of the prefix its other rows, summed.
"""

from __future__ import annotations

from torch import Tensor

from ..layout import as_gradient, empty_gradient, strides_are_free
from ..problem import AttentionProblem
from . import flash4, single
from .kernels.beside import launch_lay, launch_spans, launch_sum, launch_take


def forward(p: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    spans = launch_spans(p)
    keys, values = launch_lay(p, spans)
    sinks = p.sinks
    if sinks is not None and sinks.element_size() > 4:
        sinks = sinks.float()
    return flash4.attend(p, keys, values, spans, sinks)


def backward(
    p: AttentionProblem, grad_out: Tensor, out: Tensor, lse: Tensor, *, needs_prefix: bool
) -> tuple[Tensor, ...]:
    """All five gradients; where the prefix's are not needed, two empty tensors in their place."""
    spans = launch_spans(p)
    keys, values = launch_lay(p, spans)
    grad_query, grad_keys, grad_values = flash4.attend_backward(
        p, keys, values, spans, grad_out, out, lse, repeatable=needs_prefix
    )
    every_row_is_full = spans.queries is None and spans.used is None
    if every_row_is_full and strides_are_free():
        grad_key, grad_value = (x[:, :, p.virtual_tokens :] for x in (grad_keys, grad_values))
    else:
        grad_key, grad_value = empty_gradient(p.key), empty_gradient(p.value)
        launch_take(p, spans, grad_keys, grad_values, grad_key, grad_value)
    grads = single.unwanted(p)
    grads[:3] = as_gradient(grad_query, p.query), grad_key, grad_value
    if needs_prefix:
        grads[3:] = single.as_prefix(p, launch_sum(p, spans, grad_keys, grad_values))
    return tuple(grads)
