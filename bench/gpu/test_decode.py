"""Decoding a batch whose rows share one prefix: the share of memory bandwidth that is reached, counted on the bytes
that must be read once, and beside PyTorch's attention over an already concatenated cache."""

from __future__ import annotations

import pytest
import torch

import prefixcore
from bench.attention_problem import Problem
from bench.reference.bare_sdpa import sees_all
from bench.scale import pick

from .attention import call, check, inputs
from .clock import graphed
from .conftest import Measure
from .device import HALF
from .test_attention import name, path

TOY = Problem(1, 2, 1, 1, 16, 20, S=8)
ROWS = [Problem(32, 32, 8, 1, 128, P, S=512) for P in (2048, 8192)]
MORE = [Problem(8, 32, 8, 1, 128, 4096, S=512), Problem(128, 32, 8, 1, 128, 2048, S=512)]


def least_bytes(problem: Problem) -> int:
    """Prefix once, each row's own keys and values once, queries in and outputs out."""
    keys = 2 * problem.Hkv * problem.D * (problem.P + problem.B * problem.keys)
    return HALF.itemsize * (keys + 2 * problem.B * problem.H * problem.T * problem.D)


@pytest.mark.parametrize("problem", pick(smoke=[TOY], quick=ROWS, full=[*ROWS, *MORE]), ids=name)
def test_decode(measure: Measure, problem: Problem) -> None:
    error = check(problem, {}, backward=False)
    tensors = inputs(problem, gradients=False)
    keys, values = (
        torch.cat([tensors[f"prefix_{what}"].expand(problem.B, -1, -1, -1), tensors[what]], 2)
        for what in ("key", "value")
    )
    measure(
        "gpu decode",
        problem.case(),
        graphed(call(problem, prefixcore.prefix_attention, backward=False)),
        {
            "cached": graphed(lambda: sees_all(tensors["query"], keys, values)),
            "bare": graphed(call(problem, sees_all, backward=False, bare=True)),
        },
        moves=least_bytes(problem),
        relative_error=error,
        path=path(problem, backward=False),
    )
