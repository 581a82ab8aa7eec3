"""The goals: time over a reference, and shares of a rate. A figure that misses its goal is shown as missed."""

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


ATTENTION = (  # B, H, Hkv, T, D, P of the rows that the goals are for
    (4, 8, 8, 256, 64, 20),
    (2, 8, 8, 1024, 64, 64),
    (2, 16, 4, 1024, 128, 64),
    (1, 8, 8, 2048, 64, 512),
    (8, 12, 12, 128, 64, 16),
    (4, 9, 3, 128, 64, 15),
)
AVX512 = ("avx512", "amx")  # how the names of such instruction sets begin

# With AVX2 alone the yardstick is PyTorch's attention without a prefix, in the first three rows and float32. On AVX-512
# machines PyTorch's own kernel is 1.4 times as quick as where those goals were set, so there the yardstick is what the
# machine can do: a share of a float32 matrix product's rate, by the shortest T that it holds for.
OVER_BARE_AVX2 = Target(0.75)
RATE_AVX512 = {
    128: Target(0.65, at_least=True),
    256: Target(0.75, at_least=True),
    1024: Target(0.85, at_least=True),
}

DECODE = Target(0.22)  # over SDPA with a cache that holds the prefix already
ROBUST = Target(1.10)  # strided over contiguous, large scores over ordinary ones
COPY = Target(0.80, at_least=True)  # of the bandwidth of a copy
FASTER = Target(1.00)
STEP_OVER_BARE = Target(1.00)
STEP_OVER_PEFT = Target(0.85)  # at T = 1024, P = 64
PACKED = Target(0.50)  # a packed batch over PEFT's padded one
PACKED_SHORT = Target(0.75)  # the same with a prefix on the demo's examples: of 80 places 57 hold a token
CACHED = Target(0.55)  # a step from activations kept at the middle layer over the bare one
PEAK = Target(1.02)  # over the bare step's peak plus the prefix's own gradient and optimizer


def shape_of(case: Mapping[str, Any]) -> tuple[int, ...]:
    """B, H, Hkv, T, D, P of an attention row."""
    return tuple(case[name] for name in ("B", "H", "Hkv", "T", "D", "P"))


def over_bare(case: Mapping[str, Any], isa: str) -> Target | None:
    """The goal of our time over SDPA without a prefix, if this row has one."""
    return OVER_BARE_AVX2 if isa == "avx2" and case["dtype"] == "fp32" and shape_of(case) in ATTENTION[:3] else None


def attention_rate(case: Mapping[str, Any], isa: str) -> Target | None:
    """The goal of our share of a 1024-cubed float32 product's rate, useful operations only, if this row has one."""
    if not isa.startswith(AVX512) or case["dtype"] != "fp32" or shape_of(case) not in ATTENTION:
        return None
    return RATE_AVX512[max(length for length in RATE_AVX512 if length <= case["T"])]


def step_over_peft(case: Mapping[str, Any]) -> Target | None:
    """The goal of a step with a prefix over PEFT's, if this row has one."""
    return STEP_OVER_PEFT if case["T"] == 1024 and case["P"] == 64 and not case["ragged"] else None


def packed_over_peft(case: Mapping[str, Any]) -> Target:
    """The goal of a packed step over PEFT's padded one."""
    short = case["data"] == "the demo" and case.get("kind", "prefix") == "prefix"
    return PACKED_SHORT if short else PACKED


def cached_over_bare(case: Mapping[str, Any]) -> Target | None:
    """The goal of a step from kept activations over the bare one, if this row has one."""
    return CACHED if 2 * case["first"] == case["layers"] else None
