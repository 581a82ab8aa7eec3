"""What a count of few probes can say: intervals and a paired test."""

from __future__ import annotations

import math
from collections.abc import Sequence

CHANCE = 0.05
"""Below this p of the sign test, the page says that two scores differ."""


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927), which holds for few probes and for shares of 0 and 1 too.

    Examples:
        >>> low, high = wilson(0, 20)
        >>> round(low, 3), round(high, 3)
        (0.0, 0.161)
    """
    share, square = right / total, z * z / total
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    low = 0.0 if right == 0 else middle - half
    high = 1.0 if right == total else middle + half
    return max(0.0, low), min(1.0, high)


def sign_test(one: Sequence[float], other: Sequence[float]) -> float:
    """Two-sided p of the sign test of pairs, ties left out; McNemar's exact test where the values are 0 and 1.

    Examples:
        >>> round(sign_test([1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]), 4)
        0.0625
    """
    more = sum(a > b for a, b in zip(one, other, strict=True))
    less = sum(a < b for a, b in zip(one, other, strict=True))
    total, fewer = more + less, min(more, less)
    if total == 0:
        return 1.0
    return min(1.0, 2 * sum(math.comb(total, k) for k in range(fewer + 1)) / 2**total)
