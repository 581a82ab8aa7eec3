"""Attention problems on the GPU: inputs, the gate, and what ours is measured beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import prefixcore
from bench.attention_problem import PREFIX, SEQUENCE, Attention, Problem, solve
from bench.gates import REFERENCE_TOLERANCE, gate
from bench.reference.concatenated_sdpa import concatenated_sdpa, visible
from bench.timing import Call
from prefixcore.backends.triton import use_path

from .device import DEVICE, HALF

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Tensor cores take the softmax, and its gradient, rounded to bfloat16."""


def inputs(problem: Problem, *, gradients: bool) -> dict[str, Tensor]:
    """Random inputs on the device, in memory as transformers gives it."""
    g = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=DEVICE).to(HALF)

    tensors = {
        "query": normal(problem.B, problem.T, problem.H, problem.D).transpose(1, 2),
        "key": normal(problem.B, problem.keys, problem.Hkv, problem.D).transpose(1, 2),
        "value": normal(problem.B, problem.keys, problem.Hkv, problem.D).transpose(1, 2),
        "prefix_key": normal(problem.Hkv, problem.P, problem.D),
        "prefix_value": normal(problem.Hkv, problem.P, problem.D),
    }
    return {name: x.requires_grad_(gradients) for name, x in tensors.items()}


def grad_out(problem: Problem) -> Tensor:
    g = torch.Generator(DEVICE).manual_seed(1)
    shape = (problem.B, problem.T, problem.H, problem.D)
    return torch.randn(shape, generator=g, device=DEVICE).to(HALF).transpose(1, 2)


def concatenated(problem: Problem) -> Attention:
    """PEFT's way, with its mask built beforehand."""
    return partial(concatenated_sdpa, mask=visible(problem.T, problem.keys, problem.P).to(DEVICE))


def call(problem: Problem, attention: Attention, *, backward: bool, bare: bool = False) -> Call:
    """A forward, with all gradients where `backward`. `bare`: without the prefix."""
    tensors = inputs(problem, gradients=backward)
    if bare:
        tensors = {name: tensors[name] for name in SEQUENCE}
    grad = grad_out(problem) if backward else None

    def run() -> None:
        with torch.set_grad_enabled(backward):
            solve(attention, tensors, grad)

    return run


def answers(problem: Problem, *, backward: bool) -> dict[str, Tensor]:
    """By the float64 reference, one row and one head of keys at a time: all at once would not fit in memory."""
    tensors = {name: x.detach() for name, x in inputs(problem, gradients=False).items()}
    grad, group = grad_out(problem), problem.H // problem.Hkv
    found = {"out": torch.empty_like(tensors["query"], dtype=torch.float32)}
    if backward:
        found |= {f"grad_{name}": torch.zeros_like(x, dtype=torch.float32) for name, x in tensors.items()}
    for row in range(problem.B):
        for head in range(problem.Hkv):
            of_query = (slice(row, row + 1), slice(head * group, (head + 1) * group))
            of_key, of_prefix = (slice(row, row + 1), slice(head, head + 1)), slice(head, head + 1)
            places: dict[str, Any] = dict.fromkeys(PREFIX, of_prefix)
            places |= {"query": of_query, "key": of_key, "value": of_key}
            leaves = {name: x[places[name]].double().requires_grad_(backward) for name, x in tensors.items()}
            with prefixcore.use_backend("reference"), torch.set_grad_enabled(backward):
                part = solve(prefixcore.prefix_attention, leaves, grad[of_query].double() if backward else None)
            found["out"][of_query] = part["out"].float()
            for name in tensors if backward else ():
                found[f"grad_{name}"][places[name]] += part[f"grad_{name}"].float()
    return found


def check(
    problem: Problem,
    others: Mapping[str, Attention],
    *,
    backward: bool,
    ours: Attention = prefixcore.prefix_attention,
    paths: Sequence[str] = (),
) -> float:
    """The gate: of ours, whose greatest relative error is returned, also by each of `paths`; and of `others`."""
    want = answers(problem, backward=backward)

    def error(who: str, attention: Attention, tolerance: float) -> float:
        with torch.set_grad_enabled(backward):
            tensors = inputs(problem, gradients=backward)
            got = solve(attention, tensors, grad_out(problem) if backward else None)
        return gate(who, got, want, tolerance)

    worst = error("prefix_attention", ours, TOLERANCE[HALF])
    for path in paths:
        with use_path(path):
            worst = max(worst, error(f"prefix_attention by the {path} path", ours, TOLERANCE[HALF]))
    for who, attention in others.items():
        error(who, attention, REFERENCE_TOLERANCE[HALF])
    return worst
