"""What we set out to reach: time over reference, and rates. A figure that misses its target is shown as missed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """A bound on a figure: at most, or at least."""

    bound: float
    at_least: bool = False

    def met(self, figure: float) -> bool:
        """Judged on the figure as it is printed, with two decimals."""
        shown = round(figure, 2)
        return shown >= self.bound if self.at_least else shown <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:.2f}"


# B, H, Hkv, T, D, P: (float32 over R0, over R1, bfloat16 over R0, over R1). For forward and backward together;
# the forward alone has to be at least as good.
ATTENTION = {
    (4, 8, 8, 256, 64, 20): (0.50, 0.40, 0.35, 0.25),
    (2, 8, 8, 1024, 64, 64): (0.62, 0.42, 0.45, 0.28),
    (2, 16, 4, 1024, 128, 64): (0.72, 0.45, 0.50, 0.30),
    (1, 8, 8, 2048, 64, 512): (0.92, 0.45, 0.65, 0.30),
    (8, 12, 12, 128, 64, 16): (0.50, 0.42, 0.30, 0.25),
    (4, 9, 3, 128, 64, 15): (0.55, 0.42, 0.35, 0.28),
}
WIDE = ("avx512", "amx")  # instruction sets that the targets are for, as their names begin
AVX2 = Target(0.75)  # over R0 in the first three rows, float32, with PyTorch held to AVX2 too
DECODE = Target(0.22)  # over SDPA with a cache that holds the prefix already
ROBUST = Target(1.10)  # strided over contiguous, large scores over ordinary ones
COPY = Target(0.80, at_least=True)  # of the bandwidth of a copy
FASTER = Target(1.00)
STEP_OVER_BARE = Target(1.00)
STEP_OVER_PEFT = Target(0.85)  # at T = 1024, P = 64
PACKED = Target(0.50)  # a packed batch over PEFT's padded one
PEAK = Target(1.02)  # over the bare step's peak plus the prefix's own gradient and optimizer


def shape_of(case: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(case[name] for name in ("B", "H", "Hkv", "T", "D", "P"))


def attention(case: Mapping[str, Any], reference: str, isa: str) -> Target | None:
    """The target of our time over `reference`, if this row has one."""
    shape = shape_of(case)
    if shape not in ATTENTION or reference not in ("bare", "concatenated"):
        return None
    if not isa.startswith(WIDE):
        first_three = shape in list(ATTENTION)[:3]
        return AVX2 if isa == "avx2" and first_three and reference == "bare" and case["dtype"] == "fp32" else None
    fp32_bare, fp32_concatenated, bf16_bare, bf16_concatenated = ATTENTION[shape]
    bounds = {
        ("fp32", "bare"): fp32_bare,
        ("fp32", "concatenated"): fp32_concatenated,
        ("bf16", "bare"): bf16_bare,
        ("bf16", "concatenated"): bf16_concatenated,
    }
    return Target(bounds[case["dtype"], reference])


def step_over_peft(case: Mapping[str, Any]) -> Target | None:
    """The target of a step with a prefix over PEFT's, if this row has one."""
    return STEP_OVER_PEFT if case["T"] == 1024 and case["P"] == 64 and not case["ragged"] else None


def attention_rate(case: Mapping[str, Any], isa: str) -> Target | None:
    """The target of our share of a 1024-cubed float32 product's rate, useful operations only."""
    if not isa.startswith(WIDE) or case["dtype"] != "fp32" or shape_of(case) not in ATTENTION:
        return None
    if case["T"] >= 1024:
        return Target(0.85, at_least=True)
    return Target(0.65, at_least=True) if case["T"] == 128 else None
