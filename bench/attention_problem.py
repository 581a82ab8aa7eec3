"""Attention problems to measure: shapes, inputs, floating-point operations, float64 answers, gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import prefixcore

from .gates import REFERENCE_TOLERANCE, TOLERANCE, gate
from .reference.bare_sdpa import bare_sdpa
from .reference.concatenated_sdpa import concatenated_sdpa, visible
from .reference.merged_flash import merged_flash
from .timing import Call

Attention = Callable[..., Tensor]
SHAPE = ("B", "H", "Hkv", "T", "D", "P")
SEQUENCE = ("query", "key", "value")
PREFIX = ("prefix_key", "prefix_value")
NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Problem:
    """B, H, Hkv, T, D, P as everywhere; the sequence is causal and, unless S says otherwise, S = T."""

    B: int
    H: int
    Hkv: int
    T: int
    D: int
    P: int
    S: int | None = None
    N: int | None = None  # a bank of N prefixes, the rows of the batch take turns
    gain: float = 1.0  # multiplies the queries, and so the scores
    heads_last: bool = False  # memory [B, T, H, D], as transformers gives it

    @property
    def keys(self) -> int:
        return self.S or self.T

    def case(self, **more: Any) -> dict[str, Any]:
        """What tells this problem from others, for the table."""
        found = {name: x for name, x in asdict(self).items() if name in SHAPE or (name != "heads_last" and x)}
        if self.gain == 1.0:
            del found["gain"]
        return {**found, **more}

    def tensors(self) -> dict[str, Tensor]:
        """The inputs in float32, rounded to bfloat16, so that one float64 answer serves every dtype."""
        g = torch.Generator().manual_seed(0)

        def heads(count: int, length: int, gain: float = 1.0) -> Tensor:
            if self.heads_last:
                x = torch.randn(self.B, length, count, self.D, generator=g).transpose(1, 2)
            else:
                x = torch.randn(self.B, count, length, self.D, generator=g)
            return (gain * x).bfloat16().float()

        bank = (self.N,) if self.N else ()
        return {
            "query": heads(self.H, self.T, self.gain),
            "key": heads(self.Hkv, self.keys),
            "value": heads(self.Hkv, self.keys),
            "prefix_key": torch.randn(*bank, self.Hkv, self.P, self.D, generator=g).bfloat16().float(),
            "prefix_value": torch.randn(*bank, self.Hkv, self.P, self.D, generator=g).bfloat16().float(),
        }

    def grad_out(self) -> Tensor:
        """[B, H, T, D] in memory [B, T, H, D]: as the output projection of a transformer gives it."""
        g = torch.Generator().manual_seed(1)
        return torch.randn(self.B, self.T, self.H, self.D, generator=g).bfloat16().float().transpose(1, 2)

    def index(self) -> Tensor | None:
        """[B]: which prefix of the bank each row sees."""
        return torch.arange(self.B) % self.N if self.N else None

    def flops(self, backward: bool) -> float:
        """Useful ones: two matrix products over what each query sees, five more in the backward."""
        seen = self.T * (self.P + self.keys) - self.T * (self.T - 1) / 2
        return (7 if backward else 2) * 2 * self.B * self.H * self.D * seen

    def ours(self) -> Attention:
        return partial(prefixcore.prefix_attention, prefix_index=self.index())

    def concatenated(self) -> Attention:
        """PEFT's way, with its mask built beforehand."""
        return partial(concatenated_sdpa, mask=visible(self.T, self.keys, self.P), prefix_index=self.index())


def inputs(problem: Problem, dtype: torch.dtype, *, gradients: bool) -> dict[str, Tensor]:
    """The problem's inputs in `dtype`, as leaves that want a gradient where `gradients`."""
    return {name: x.to(dtype).requires_grad_(gradients) for name, x in problem.tensors().items()}


def solve(attention: Attention, tensors: Mapping[str, Tensor], grad_out: Tensor | None) -> dict[str, Tensor]:
    """The output and, given `grad_out`, the gradient of every input."""
    out = attention(*tensors.values())
    if grad_out is None:
        return {"out": out}
    gradients = torch.autograd.grad(out, tuple(tensors.values()), grad_out)
    return {"out": out.detach(), **{f"grad_{name}": x for name, x in zip(tensors, gradients, strict=True)}}


def call(problem: Problem, attention: Attention, dtype: torch.dtype, *, backward: bool, bare: bool = False) -> Call:
    """A forward, with all gradients where `backward`, as something to be timed. `bare`: without the prefix."""
    tensors = inputs(problem, dtype, gradients=backward)
    if bare:
        tensors = {name: tensors[name] for name in SEQUENCE}
    grad_out = problem.grad_out().to(dtype) if backward else None

    def run() -> None:
        with torch.set_grad_enabled(backward):
            solve(attention, tensors, grad_out)

    return run


@lru_cache(maxsize=2)
def answers(problem: Problem, bare: bool = False) -> dict[str, Tensor]:
    """Output and gradients in float64, by the reference that defines correctness."""
    tensors = {name: x.double().requires_grad_() for name, x in problem.tensors().items()}
    if bare:
        tensors = {name: tensors[name] for name in SEQUENCE}
    with prefixcore.use_backend("reference"):
        attention = partial(prefixcore.prefix_attention, prefix_index=None if bare else problem.index())
        return {name: x.float() for name, x in solve(attention, tensors, problem.grad_out().double()).items()}


def check(
    problem: Problem,
    attention: Attention,
    dtype: torch.dtype,
    *,
    backward: bool,
    who: str | None = None,
    bare: bool = False,
) -> float:
    """The gate; `who`: the name of a reference, None: ours. Returns the greatest relative error.

    Large scores get three times the tolerance: a rounded score moves the softmax by as much as it is large, and what
    is left of a gradient is a small difference. PyTorch's own float32 attention is 2e-5 off there.
    """
    tensors = inputs(problem, dtype, gradients=backward)
    if bare:
        tensors = {name: tensors[name] for name in SEQUENCE}
    with torch.set_grad_enabled(backward):
        got = solve(attention, tensors, problem.grad_out().to(dtype) if backward else None)
    want = {name: x for name, x in answers(problem, bare).items() if name in got}
    tolerance = (TOLERANCE if who is None else REFERENCE_TOLERANCE)[dtype] * (3 if problem.gain > 1 else 1)
    return gate(who or "prefix_attention", got, want, tolerance)


def rivals(problem: Problem, dtype: torch.dtype, *, backward: bool, also: Mapping[str, Attention]) -> dict[str, Call]:
    """The references' calls by name, each through its gate: bare, concatenated, merged and `also`."""
    check(problem, bare_sdpa, dtype, backward=backward, who="bare SDPA", bare=True)
    calls = {"bare": call(problem, bare_sdpa, dtype, backward=backward, bare=True)}
    for name, attention in {"concatenated": problem.concatenated(), "merged": merged_flash, **also}.items():
        if name == "merged" and (problem.N or problem.keys != problem.T):
            continue
        check(problem, attention, dtype, backward=backward, who=name)
        calls[name] = call(problem, attention, dtype, backward=backward)
    return calls


def matrix_product() -> tuple[Call, float]:
    """A 1024-cubed float32 product, the yardstick of what the machine can do, and its floating-point operations."""
    a, b = torch.randn(2, 1024, 1024, generator=torch.Generator().manual_seed(0))
    out = torch.empty(1024, 1024)
    return (lambda: torch.mm(a, b, out=out)), 2.0 * 1024**3
