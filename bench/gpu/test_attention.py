"""`prefix_attention` in training: beside the same fused attention without any prefix, beside concatenating and
masking, and beside compiled FlexAttention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import prefixcore
from bench.attention_problem import Problem
from bench.reference.bare_sdpa import bare_sdpa
from bench.reference.flex import make_flex
from bench.scale import SCALE, pick

from . import paths
from .attention import call, check, concatenated
from .conftest import LeftOut, Measure
from .device import DEVICE, REAL

TOY = Problem(1, 2, 1, 12, 16, 5, heads_last=True)
ROWS = [Problem(8, 32, 8, 2048, 128, P, heads_last=True) for P in (64, 512, 2048, 8192)]
LENGTHS = [Problem(8, 32, 8, T, 128, 64, heads_last=True) for T in (512, 1024, 4096)]
OTHERS = [Problem(8, 32, 8, 2048, 128, 20, heads_last=True), Problem(8, 16, 16, 2048, 64, 64, heads_last=True),
          Problem(2, 32, 8, 8192, 128, 512, heads_last=True)]  # fmt: skip
MORE = [
    Problem(1, 32, 8, 8192, 128, 64, heads_last=True),
    Problem(4, 16, 4, 2048, 256, 64, heads_last=True),
    Problem(64, 32, 8, 128, 128, 64, heads_last=True),
]


def name(problem: Any) -> str | None:
    if not isinstance(problem, Problem):
        return None
    return "-".join(str(x) for x in (problem.B, problem.H, problem.Hkv, problem.T, problem.D, problem.P))


def path(problem: Problem, *, backward: bool) -> dict[str, str]:
    """Which path and whose kernel, in words: part of the figure."""
    return {which: f"{name}: {why}" for which, (name, why) in paths.taken(problem, backward=backward).items()}


BOTH = [False, True]
CASES = pick(
    smoke=[(TOY, backward) for backward in BOTH],
    quick=[(ROWS[0], False), *((row, True) for row in (*ROWS, *LENGTHS, *OTHERS))],
    full=[(row, backward) for row in (*ROWS, *LENGTHS, *OTHERS, *MORE) for backward in BOTH],
)
FLEX = (64, 2048)
"""The prefixes that FlexAttention is measured with in a quick run: compiling it takes longer than all else here."""


@pytest.mark.parametrize(("problem", "backward"), CASES, ids=lambda x: name(x) or ("fwd+bwd" if x else "fwd"))
def test_training(measure: Measure, left_out: LeftOut, problem: Problem, backward: bool) -> None:
    others = {"concatenated": concatenated(problem)}
    if REAL and (SCALE == "full" or (problem.P in FLEX and problem in ROWS)):
        others["flex"] = make_flex(problem.T, problem.P, device=DEVICE)
    ways = paths.possible(problem, left_out, backward=backward)
    error = check(problem, others, backward=backward, paths=ways)
    ours = call(problem, prefixcore.prefix_attention, backward=backward)
    calls = {who: call(problem, attention, backward=backward) for who, attention in others.items()}
    calls["bare"] = call(problem, bare_sdpa, backward=backward, bare=True)
    measure(
        "gpu attention",
        problem.case(backward=backward),
        ours,
        {**calls, **{paths.reference_name(way): paths.forced(way, ours) for way in ways}},
        relative_error=error,
        path=path(problem, backward=backward),
        peak=peaks(problem, backward=backward),
    )


def peaks(problem: Problem, *, backward: bool) -> dict[str, int]:
    """Bytes that one call allocates at most, beyond its inputs."""
    if not REAL:
        return {}
    found = {}
    for who, attention, bare in (("candidate", prefixcore.prefix_attention, False), ("bare", bare_sdpa, True)):
        run = call(problem, attention, backward=backward, bare=bare)
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        found[who] = torch.cuda.max_memory_allocated() - before
    return found
