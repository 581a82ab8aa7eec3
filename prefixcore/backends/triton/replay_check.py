"""Tries replay on a device: what a plan computes against what the ordinary way does, for `prefixcore doctor`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gradients
from ..problem import attention_problem
from . import replay

_PROBLEMS = {"training": (16, 16), "decoding": (1, 48)}


def tried(device: torch.device, dtype: torch.dtype) -> list[tuple[str, str]]:
    """Small problems by name, and in words whether their second call, replayed, gave the bits of the ordinary way.

    They stay among the plans that are kept.
    """
    return [(name, _try(device, dtype, *sizes)) for name, sizes in _PROBLEMS.items()]


def _try(device: torch.device, dtype: torch.dtype, queries: int, keys: int) -> str:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, queries, 64), (2, 2, keys, 64), (2, 2, keys, 64), (2, 20, 64), (2, 20, 64))
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    with replay.use_replay(False):
        want = _results(tensors)
    with replay.use_replay(True):
        before = _replays()
        _results(tensors)
        got = _results(tensors)
        replays = _replays() - before
    if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
        return "differs from the ordinary way: keep replay off, and report it"
    return f"the same bits as the ordinary way ({replays} replays)" if replays else "not replayed"


def _results(tensors: list[Tensor]) -> list[Tensor]:
    """Output and all gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, _ = gradients.prefix_attention(attention_problem(*leaves))
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def _replays() -> int:
    return sum(plan.replays for plan in replay.kept())
