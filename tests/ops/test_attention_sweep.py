"""Random problems by the hundred on every instruction set, with more threads than the other tests have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.device import examples

from .problems import Problem, check, varied
from .test_attention_correct import packed, problems

pytestmark = pytest.mark.slow
many = settings(
    max_examples=examples(400),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def conditioned(problem: Problem) -> Problem:
    """Large scores under a softcap lie where tanh is flat: of its slope, 1 - tanh^2, float32 has few digits right."""
    return varied(problem, gain=1.0) if problem.softcap else problem


def is_rounded(isa: str, problem: Problem) -> bool:
    """Whether a float32 prefix is rounded to bfloat16 before it is multiplied: the larger a score, the more that is."""
    return isa in ("avx512_bf16", "amx") and problem.dtype == torch.bfloat16 and problem.prefix_dtype == torch.float32


@many
@given(problem=problems.map(conditioned))
def test_anything(isa: str, problem: Problem) -> None:
    problem = varied(problem, gain=1.0) if is_rounded(isa, problem) else problem
    check(problem, slack=16.0)  # one number alone may be what is left of many in a half precision


@many
@given(problem=packed)
def test_anything_packed(isa: str, problem: Problem) -> None:
    check(problem)
