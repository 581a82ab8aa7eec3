"""How the ops differentiate, and the quickest way into them.

`torch.library.register_autograd` would do, but what it generates fills in defaults, flattens trees and leaves cycles
to the garbage collector, which then keep an op's output alive: several times the cost of a small call. So each op has
an `autograd.Function` of its own. `AUTOGRAD` is what the dispatcher calls where it would call PyTorch's own
derivatives; eager code calls the same functions directly and spares itself the dispatcher's way into Python and back.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .layout import free_strides
from .problem import AttentionProblem

_below_autograd = torch._C._AutoDispatchBelowAutograd
_any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad
_is_tracing: Callable[[], bool] = torch._C._is_tracing
_functorch: Any = getattr(torch._C, "_functorch", None)  # a binary module, of which the stubs know little
_ops = torch.ops.prefixcore


shortcut: Callable[[str, tuple[Any, ...]], Any] | None = None
"""Asked with an op's name and arguments before the dispatcher: its results, or None. Set while plans are replayed."""


_BAD_ARGUMENT = re.compile(r"(?!prefixcore)[\w /]+(\[\d+\])?: expected ")
"""How the library begins to say which argument, or which of several, is wrong; its other errors begin otherwise."""


def _call(op: Any, arguments: tuple[Any, ...]) -> Any:
    """`op(*arguments)`; ValueError: a bad argument, of which torch 2.15 makes a RuntimeError.

    Compiled code comes here by `AUTOGRAD`, except inside `torch.inference_mode`, whose tensors have no autograd: there
    the dispatcher calls the library itself, and torch 2.15's error stays what it is.
    """
    try:
        return op(*arguments)
    except RuntimeError as error:
        if type(error) is RuntimeError and _BAD_ARGUMENT.match(str(error)):
            raise ValueError(str(error)) from None
        raise


def _run(name: str, op: Any, arguments: tuple[Any, ...]) -> Any:
    """`op(*arguments)` below autograd."""
    with _below_autograd():
        if shortcut is not None and (out := shortcut(name, arguments)) is not None:
            return out
        return _call(op, arguments)


def _apply(function: type[Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`, without what it first does for `torch.func`: a fifth of a small call."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(Function, function).apply(*arguments)  # type: ignore[misc]


def check_transforms(op: str) -> bool:
    """Whether the call is under no transform of `torch.func`.

    Raises NotImplementedError where the kernels' derivatives would be lost: they are known to `backward` alone.
    Without this, forward-mode differentiation would silently take every derivative for zero.
    """
    stack = _functorch.get_interpreter_stack()
    forward_mode = forward_ad._current_level >= 0  # also inside torch.func.jvp, but in compiled code
    if stack is None and not forward_mode:
        return True
    levels = {level.key().name for level in stack or ()}
    if forward_mode or levels & {"Grad", "Jvp"}:
        got = "torch.func.grad or vjp" if "Jvp" not in levels and not forward_mode else "forward-mode differentiation"
        raise NotImplementedError(
            f"{op}: expected the gradient to be taken by backward() or torch.autograd.grad, got {got}, which the "
            "kernels have no rule for; take it through the reference, inside "
            "'with prefixcore.use_backend(\"reference\")'"
        )
    return False


class _NoSecondDerivative(Function):
    """A backward op where its own gradient may be asked for."""

    @staticmethod
    def forward(ctx: Any, op: Any, *arguments: Any) -> Any:
        with _below_autograd():
            return _call(op, arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "prefixcore's ops have no second derivative: take it through the reference, inside "
            "'with prefixcore.use_backend(\"reference\")'"
        )


def prefix_attention_backward(*arguments: Any) -> tuple[Tensor, ...]:
    op = _ops.prefix_attention_backward.default
    if torch.is_grad_enabled() and _any_requires_grad(*arguments):
        return _NoSecondDerivative.apply(op, *arguments)
    result: tuple[Tensor, ...] = _run("prefix_attention_backward", op, arguments)
    return result


def soft_embedding_backward(*arguments: Any) -> Tensor:
    op = _ops.soft_embedding_backward.default
    if torch.is_grad_enabled() and _any_requires_grad(*arguments):
        return _NoSecondDerivative.apply(op, *arguments)
    result: Tensor = _run("soft_embedding_backward", op, arguments)
    return result


class _PrefixAttention(Function):
    """Its arguments are the tensors that may want a gradient, which autograd sees only there, and the whole record."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor,
        p: AttentionProblem,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = _run("prefix_attention", _ops.prefix_attention.default, p)
        ctx.save_for_backward(*p.tensors, out, lse)
        ctx.options = p.options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        *tensors, out, lse = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        query, key, value, prefix_key, prefix_value, _ = ctx.needs_input_grad
        with free_strides():
            grads = prefix_attention_backward(
                grad_out, grad_lse, out, lse, *tensors, *ctx.options, query, key or value, prefix_key or prefix_value
            )
        return (
            grads[0] if query else None,
            grads[1] if key else None,
            grads[2] if value else None,
            grads[3] if prefix_key else None,
            grads[4] if prefix_value else None,
            None,
        )


def prefix_attention(p: AttentionProblem) -> tuple[Tensor, Tensor]:
    """The op, its gradient recorded where one is asked for: for eager code outside functional transforms."""
    differentiable = p.differentiable
    if torch.is_grad_enabled() and _any_requires_grad(*differentiable):
        if _is_tracing():
            raise NotImplementedError(
                "torch.jit.trace cannot record the gradient of prefix attention: trace inside torch.no_grad()"
            )
        return _apply(_PrefixAttention, *differentiable, p)
    result: tuple[Tensor, Tensor] = _run("prefix_attention", _ops.prefix_attention.default, p)
    return result


class _SoftEmbedding(Function):
    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, weight: Tensor, virtual: Tensor) -> Tensor:
        out: Tensor = _run("soft_embedding", _ops.soft_embedding.default, (input_ids, weight, virtual))
        ctx.save_for_backward(input_ids)
        ctx.vocabulary, ctx.num_virtual = weight.shape[0], virtual.shape[0]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor | None]:
        if not ctx.needs_input_grad[2]:
            return None, None, None
        (input_ids,) = ctx.saved_tensors
        return None, None, soft_embedding_backward(grad, input_ids, ctx.vocabulary, ctx.num_virtual)


def soft_embedding(input_ids: Tensor, weight: Tensor, virtual: Tensor) -> Tensor:
    """As `prefix_attention`."""
    if torch.is_grad_enabled() and _any_requires_grad(weight, virtual):
        return _apply(_SoftEmbedding, input_ids, weight, virtual)
    result: Tensor = _run("soft_embedding", _ops.soft_embedding.default, (input_ids, weight, virtual))
    return result


def _checked(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """For compiled code, and for whoever calls the registered ops: `prefixcore.ops` has not looked at these calls."""

    def call(*arguments: Any) -> Any:
        check_transforms(op)
        return function(*arguments)

    return call


AUTOGRAD: dict[str, Callable[..., Any]] = {
    "prefix_attention": _checked("prefix_attention", lambda *fields: prefix_attention(AttentionProblem(*fields))),
    "prefix_attention_backward": _checked("prefix_attention", prefix_attention_backward),
    "soft_embedding": _checked("soft_embedding", soft_embedding),
    "soft_embedding_backward": _checked("soft_embedding", soft_embedding_backward),
}
