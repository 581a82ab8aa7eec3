"""Correctness gates: a benchmark that fails its gate reports no figure."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""Relative error, by norm, of our kernels against float64."""
REFERENCE_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""The same for the implementations that we are compared with: some sum gradients in bfloat16, and are none the worse
as a reference for speed."""


def relative_error(got: Tensor, want: Tensor) -> float:
    """By norm, in float64; NaN counts as an infinite error."""
    if got.shape != want.shape:
        return float("inf")
    got, want = got.detach().double(), want.detach().double()
    error = float((got - want).norm() / want.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def gate(who: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float) -> float:
    """Fails the benchmark unless every tensor of `want` is there in `got` and right; returns the greatest error."""
    errors = {name: relative_error(got[name], expected) for name, expected in want.items()}
    wrong = [f"{name} {error:.1e}" for name, error in errors.items() if error > tolerance]
    if wrong:
        pytest.fail(f"{who} is wrong, so nothing is reported: relative error {', '.join(wrong)}; allowed {tolerance}")
    return max(errors.values())
