"""Attention problems of every shape and option, and the float64 answers that define correctness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import prefixcore
from prefixcore.backends.problem import AttentionProblem, attention_problem
from tests.device import DEVICE, NAME

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
if NAME != "cpu":  # tensor cores take the softmax, and its gradient, rounded; the interpreter cuts bfloat16 off instead
    TOLERANCE |= {torch.bfloat16: 1e-2, torch.float16: 2e-3}
GRADIENTS = ("query", "key", "value", "prefix_key", "prefix_value")


@dataclass(frozen=True)
class Problem:
    """What a test varies; ``tensors`` makes the inputs from it, always the same ones."""

    B: int = 2
    H: int = 4
    Hkv: int = 2
    T: int = 17
    S: int | None = None  # as T
    D: int = 32
    Dv: int | None = None  # as D
    P: int = 5
    N: int | None = None  # a bank of N entries
    dtype: torch.dtype = torch.float32
    prefix_dtype: torch.dtype | None = None  # as dtype
    heads_last: bool = False  # [B, T, H, D] memory, as transformers gives it
    gain: float = 1.0  # multiplies the queries: large scores
    mask: str | None = None  # "padding", "bool", "additive", "heads"
    index: bool = False
    lengths: bool = False
    packed: tuple[int, ...] | None = None  # lengths of the packed sequences
    is_causal: bool = True
    scale: float | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    seed: int = 0

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """``(differentiable, options)``: the arguments of ``prefix_attention``, on the device under test."""
        with torch.device("cpu"):
            tensors, options = self._made_on_the_cpu()
        options = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
        return {name: x.to(DEVICE) for name, x in tensors.items()}, options

    def record(self) -> AttentionProblem:
        """The arguments of the registered op, as ``prefix_attention`` normalises them."""
        tensors, options = self.tensors()
        mask = options.pop("attn_mask", None)
        if mask is not None and mask.dim() == 2:
            options["padding"] = mask
        elif mask is not None:
            options["mask"] = mask.expand(*tensors["query"].shape[:3], tensors["key"].shape[2])
        return attention_problem(**tensors, **{name: x for name, x in options.items() if x is not None})

    def _made_on_the_cpu(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Random numbers are the same wherever they are computed with."""
        g = torch.Generator().manual_seed(self.seed)
        B, T = (1, sum(self.packed)) if self.packed else (self.B, self.T)
        S = T if self.S is None else self.S
        Dv = self.Dv or self.D

        def heads(count: int, length: int, dim: int, gain: float = 1.0) -> Tensor:
            if self.heads_last:
                x = torch.randn(B, length, count, dim, generator=g).transpose(1, 2)
            else:
                x = torch.randn(B, count, length, dim, generator=g)
            return (gain * x).to(self.dtype)

        bank = (self.N,) if self.N else ()
        prefix_dtype = self.prefix_dtype or self.dtype
        tensors = {
            "query": heads(self.H, T, self.D, self.gain),
            "key": heads(self.Hkv, S, self.D),
            "value": heads(self.Hkv, S, Dv),
            "prefix_key": torch.randn(*bank, self.Hkv, self.P, self.D, generator=g).to(prefix_dtype),
            "prefix_value": torch.randn(*bank, self.Hkv, self.P, Dv, generator=g).to(prefix_dtype),
        }
        rows = len(self.packed) if self.packed else B
        options: dict[str, Any] = {
            "is_causal": self.is_causal,
            "scale": self.scale,
            "sliding_window": self.sliding_window,
            "softcap": self.softcap,
        }
        if self.index:
            options["prefix_index"] = torch.randint(-1, self.N or 1, (rows,), generator=g)
        if self.lengths:
            options["prefix_lengths"] = torch.randint(0, self.P + 1, (self.N or 1,), generator=g)
        if self.packed:
            options["cu_seqlens"] = torch.tensor([0, *self.packed]).cumsum(0)
        if self.sinks:
            options["sinks"] = torch.randn(self.H, generator=g)
        if self.mask == "padding":  # right, left, none, all padded: one row each, again and again
            keep = torch.randint(0, S + 1, (B,), generator=g)
            keep[2::4], keep[3::4] = S, 0
            j = torch.arange(S)
            right = j < keep[:, None]
            left = j >= S - keep[:, None]
            options["attn_mask"] = torch.where((torch.arange(B) % 2 == 0)[:, None], right, left)
        elif self.mask == "bool":
            options["attn_mask"] = torch.rand(1, 1, T, S, generator=g) > 0.3
        elif self.mask == "additive":
            bias = torch.randn(B, 1, T, S, generator=g)
            options["attn_mask"] = bias.masked_fill(torch.rand(B, 1, T, S, generator=g) < 0.2, -torch.inf).to(
                self.dtype
            )
        elif self.mask == "heads":  # as ALiBi: one additive row a head
            options["attn_mask"] = torch.randn(1, self.H, 1, S, generator=g)
        return tensors, options


def output_alone(**arguments: Any) -> tuple[Tensor, Tensor]:
    """As a model uses the op: no gradient comes in through the log-sum-exp, which only the single path takes."""
    out, lse = prefixcore.prefix_attention(**arguments)
    return out, lse.detach()


def run(problem: Problem, attention: Callable[..., Any] = prefixcore.prefix_attention, wide: bool = False) -> dict:
    """Output, lse and every gradient, from the real inputs (``wide``: the same inputs in float64)."""
    tensors, options = problem.tensors()
    if wide:
        tensors = {name: x.double() for name, x in tensors.items()}
        options = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in options.items()}
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out, lse = attention(**leaves, **options, return_lse=True)
    g = torch.Generator().manual_seed(problem.seed + 1)
    grad_out = torch.randn(out.shape, generator=g, device="cpu").to(problem.dtype).to(out)
    grad_lse = torch.randn(lse.shape, generator=g, device="cpu").to(lse)
    finite = lse.detach().isfinite()  # a query that sees nothing has no log-sum-exp to differentiate
    loss = (out * grad_out).sum() + torch.where(finite, lse * grad_lse, 0).sum()
    torch.autograd.backward(loss)
    results = {"out": out.detach(), "lse": lse.detach()}
    results |= {f"grad_{name}": x.grad for name, x in leaves.items()}
    return results


def relative_error(got: Tensor, want: Tensor) -> float:
    """By norm, in float64; infinities must stand in the same places."""
    got, want = got.detach().double(), want.detach().double()
    infinite = want.isinf()
    assert torch.equal(got.isinf(), infinite)
    got, want = got.masked_fill(infinite, 0), want.masked_fill(infinite, 0)
    assert not got.isnan().any()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def check(problem: Problem, slack: float = 1.0, attention: Callable[..., Any] = prefixcore.prefix_attention) -> None:
    """Holds the kernels to the float64 reference: output, lse and every gradient.

    ``slack`` multiplies the tolerance of the half precisions. Their output is rounded before the backward reads it
    (delta = <dO, O>), and where a query sees two or three keys the gradient of its scores nearly cancels.
    """
    with prefixcore.use_backend("reference"):
        want = run(problem, attention, wide=True)
    got = run(problem, attention)
    for name, expected in want.items():
        assert got[name].shape == expected.shape, name
        tolerance = TOLERANCE[problem.dtype] * (1.0 if problem.dtype == torch.float32 else slack)
        if expected.norm() < 1e-6:  # nothing flows here: then nothing may
            assert got[name].double().norm() < 1e-5, name
            continue
        error = relative_error(got[name], expected)
        assert error < tolerance, f"{name}: relative error {error:.2e} exceeds {tolerance} in {problem}"


def varied(base: Problem, **changes: Any) -> Problem:
    return replace(base, **changes)
