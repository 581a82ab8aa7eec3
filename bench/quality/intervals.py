"""How sure a share of right answers is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache


def mean(rows: Sequence[str]) -> float:
    """The share of "1" in all rows; a row is a seed, a place in it an example of the test side."""
    return sum(row.count("1") for row in rows) / sum(map(len, rows))


@cache
def interval(rows: tuple[str, ...], *, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean over seeds, by drawing the examples anew: seeds answer the same ones.

    Where every answer is right, or none is, nothing varies in what is drawn; the bound is then that of "three in n".
    """
    columns = list(zip(*rows, strict=True))
    shares = [column.count("1") / len(column) for column in columns]
    n = len(shares)
    if min(shares) == max(shares) and shares[0] in (0.0, 1.0):
        return (0.0, min(1.0, 3 / n)) if shares[0] == 0 else (max(0.0, 1 - 3 / n), 1.0)
    draw = random.Random(0)
    means = sorted(sum(draw.choices(shares, k=n)) / n for _ in range(draws))
    return means[round(0.025 * draws)], means[round(0.975 * draws) - 1]


def percent(rows: Sequence[str]) -> str:
    """The mean with its interval, in percent."""
    low, high = interval(tuple(rows))
    return f"{100 * mean(rows):.0f} ({100 * low:.0f}..{100 * high:.0f})"
