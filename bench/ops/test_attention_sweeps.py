"""How the cost of `prefix_attention` grows: T, P, B, N and threads, one at a time, with the references beside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.attention_problem import Problem, call, check, rivals
from bench.conftest import Measure
from bench.scale import pick

BASE = pick(
    smoke=[Problem(2, 2, 2, 16, 16, 4)], quick=[Problem(2, 8, 8, 512, 64, 32)], full=[Problem(2, 8, 8, 512, 64, 32)]
)[0]
CORES = torch.get_num_threads()

SWEPT: dict[str, list[Any]] = {
    "T": pick(smoke=[8, 16], quick=[128, 512, 1024], full=[64, 128, 256, 512, 1024, 2048, 4096]),
    "P": pick(smoke=[1, 4], quick=[8, 64, 512], full=[1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]),
    "B": pick(smoke=[1, 2], quick=[1, 4], full=[1, 2, 4, 8, 16]),
    "N": pick(smoke=[1, 2], quick=[1, 8], full=[1, 2, 4, 8, 16, 32, 64]),
    "threads": pick(
        smoke=[1], quick=sorted({1, CORES}), full=sorted({1, 2, 4, 8, 16, CORES} & set(range(1, CORES + 1)))
    ),
}


def problem(axis: str, value: int) -> Problem:
    if axis == "threads":
        return BASE
    if axis == "N":  # as many rows as prefixes at least, so that every prefix is seen
        return replace(BASE, N=value, B=max(SWEPT["N"]), T=min(BASE.T, 128))
    changes: dict[str, Any] = {axis: value}
    return replace(BASE, **changes)


@pytest.mark.parametrize(("axis", "value"), [(axis, value) for axis, values in SWEPT.items() for value in values])
def test_sweep(measure: Measure, threads: Callable[[int], None], axis: str, value: int) -> None:
    """Forward and backward, float32."""
    if axis == "threads":
        threads(value)
    swept = problem(axis, value)
    error = check(swept, swept.ours(), torch.float32, backward=True)
    measure(
        "attention sweep",
        swept.case(axis=axis, value=value),
        call(swept, swept.ours(), torch.float32, backward=True),
        rivals(swept, torch.float32, backward=True, also={}),
        relative_error=error,
    )
