"""What a replay costs: calls and memory.

Where there is no GPU, `stand_in` takes the driver's place and Triton's interpreter runs what is launched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

import prefixcore
from prefixcore.backends.triton import replay, use_path
from prefixcore.backends.triton.plan_words import Memory
from tests.backends.triton import stand_in
from tests.backends.triton.replaying import WITHOUT_GPU, small_tensors

pytestmark = WITHOUT_GPU


class Calls:
    """Counts the Python functions, and those of C that Python calls, that a thread goes through."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.python = self.c = 0
        work()
        sys.setprofile(self._count)
        try:
            work()
        finally:
            sys.setprofile(None)

    def _count(self, frame: Any, event: str, what: Any) -> None:
        self.python += event == "call"
        self.c += event == "c_call"


def test_a_replay_costs_few_calls(plans: stand_in.Interpreted, nothing_computed: None) -> None:
    """A count, and no clock: each of these calls is a tenth of a microsecond, or a few."""
    tensors = small_tensors()
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    grad = torch.ones(2, 2, 5, 16)

    def forward() -> object:
        return prefixcore.prefix_attention(**tensors)

    def both() -> object:
        return torch.autograd.grad(prefixcore.prefix_attention(**leaves), list(leaves.values()), grad)

    counted = {}
    for name, work in (("forward", forward), ("both", both)):
        work()
        stand_in.driver().stand_in_on_launch(None)  # of which nothing is counted
        with replay.use_replay(False):
            ordinary = Calls(work)
        replayed = Calls(work)
        counted[name] = (replayed.python, replayed.c)
        assert replayed.python + replayed.c < (ordinary.python + ordinary.c) / 5, (vars(replayed), vars(ordinary))
    assert sum(counted["forward"]) <= CEILING["forward"], counted
    assert sum(counted["both"]) <= CEILING["both"], counted


CEILING = {"forward": 75, "both": 190}


def test_a_replay_allocates_what_the_ordinary_way_does(plans: stand_in.Interpreted, nothing_computed: None) -> None:
    """And frees it as early: scratch is gone before the next is needed."""
    tensors = small_tensors()
    for path, forward in (("single", 2), ("decode", 4)):
        with use_path(path):
            prefixcore.prefix_attention(**tensors)
        steps = next(iter(reversed(replay._plans.values()))).plan.steps
        assert sum(isinstance(step, Memory) for step in steps) == forward, path
