"""What one call costs the CPU, and how many kernels it launches, beside PyTorch's attention without a prefix: enqueued
while the GPU is busy, so that nothing but launching is timed."""

from __future__ import annotations

import pytest

import prefixcore
from bench.attention_problem import Attention, Problem
from bench.reference.bare_sdpa import bare_sdpa, sees_all
from bench.scale import pick

from . import clock
from .attention import call, check
from .conftest import Measure
from .test_attention import name, path

SMALL = Problem(8, 9, 3, 64, 64, 20, heads_last=True)
LONGER = Problem(1, 32, 8, 512, 128, 64, heads_last=True)
ONE = Problem(8, 9, 3, 1, 64, 20, S=64)
CASES = [(SMALL, False), (SMALL, True), (LONGER, False), (LONGER, True), (ONE, False)]
TOYS = [(Problem(1, 2, 1, 8, 16, 5, heads_last=True), True), (Problem(1, 2, 1, 1, 16, 5, S=8), False)]


@pytest.mark.parametrize(("problem", "backward"), pick(smoke=TOYS, quick=CASES, full=CASES), ids=lambda x: name(x))
def test_launching(measure: Measure, problem: Problem, backward: bool) -> None:
    error = check(problem, {}, backward=backward)
    bare: Attention = bare_sdpa if problem.T > 1 else sees_all
    ours = call(problem, prefixcore.prefix_attention, backward=backward)
    theirs = call(problem, bare, backward=backward, bare=True)
    measure(
        "gpu launching",
        problem.case(backward=backward),
        ours,
        {"bare": theirs},
        seconds=clock.launch_seconds,
        relative_error=error,
        kernels={"candidate": clock.kernels(ours), "bare": clock.kernels(theirs)},
        path=path(problem, backward=backward),
    )
