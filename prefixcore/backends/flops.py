"""What the ops cost, for PyTorch's FLOP counter (`torch.utils.flop_counter.FlopCounterMode`).

As PyTorch counts its own attention: every query with every key, whether mask, window and causality hide it or not, here
with the prefix's keys; packed sequences by themselves. `soft_embedding` looks up, which is no floating-point operation.

A counter knows the formulas that are registered when it is made. To import it takes a fifth of a second, as it imports
Triton, so what registers ours waits until somebody else imports it.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .problem import AttentionProblem

_COUNTER = "torch.utils.flop_counter"


def _scores(p: AttentionProblem) -> int:
    """How many scores of a query and a key there are."""
    if p.cu_seqlens is None:
        return p.batch * p.heads * p.queries * (p.virtual_tokens + p.keys)
    # Fake tensors have no values: one sequence, the most that it can be.
    is_real = type(p.cu_seqlens) is Tensor and not p.cu_seqlens.is_meta
    lengths = p.cu_seqlens.diff().tolist() if is_real else [p.queries]
    return p.heads * sum(length * (p.virtual_tokens + length) for length in lengths)


def forward_flops(*fields: Any, out_val: Any = None) -> int:
    """Of `prefix_attention`: the scores, and the values that they weigh."""
    p = AttentionProblem(*fields)
    return 2 * _scores(p) * (p.head_dim + p.value_dim)


def backward_flops(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any, out_val: Any = None
) -> int:
    """Of its backward: the scores once more and the gradients of queries and keys; those of scores and values."""
    p = AttentionProblem(*arguments[: len(AttentionProblem._fields)])
    return 2 * _scores(p) * (3 * p.head_dim + 2 * p.value_dim)


def _register(counter: ModuleType) -> None:
    ops = torch.ops.prefixcore
    for op, formula in ((ops.prefix_attention, forward_flops), (ops.prefix_attention_backward, backward_flops)):
        if op not in counter.flop_registry:
            counter.register_flop_formula(op, get_raw=True)(formula)


class _WhenImported(MetaPathFinder):
    """Registers the formulas right after the counter's own, and is gone."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        with suppress(ValueError):  # another thread was here
            sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Has the counter know the ops, now or once it is imported."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
