"""Timing in turns, gates, and the bytes kept for a backward: the parts that every benchmark stands on."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from bench import gates, machine, timing
from bench.attention_problem import Problem, answers, check
from bench.memory.saved import saved_bytes
from bench.reference.bare_sdpa import bare_sdpa
from bench.reference.merged_flash import merged_flash


class Benchmark:
    """As much of pytest-benchmark's fixture as is used: it times one callable after a set-up."""

    def __init__(self, enabled: bool = True) -> None:
        self.extra_info: dict = {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[])) if enabled else None

    def pedantic(self, call, setup, rounds, iterations):
        assert iterations == 1
        for _ in range(rounds):
            setup()
            seconds = timing.seconds_of(call)
            if self.stats:
                self.stats.stats.data.append(seconds)


def test_every_round_calls_all_in_turn() -> None:
    calls: list[str] = []

    def named(name: str, seconds: float):
        def call() -> None:
            calls.append(name)
            time.sleep(seconds)

        return call

    benchmark = Benchmark()
    figures = timing.interleaved(benchmark, named("c", 0.004), {"a": named("a", 0.002), "b": named("b", 0.008)})
    rounds = [calls[i : i + 3] for i in range(len(calls) - 3 * figures["rounds"], len(calls), 3)]
    assert rounds[:2] == [["a", "b", "c"], ["b", "a", "c"]]
    assert figures["rounds"] >= 7
    assert set(figures["seconds"]) == {"candidate", "a", "b"}
    assert 1.3 < figures["ratios"]["a"]["of_minima"] < 2.7
    assert 0.3 < figures["ratios"]["b"]["of_minima"] < 0.7
    assert benchmark.extra_info["ratios"] == figures["ratios"]


def test_a_quick_call_is_repeated_and_its_time_divided() -> None:
    benchmark = Benchmark()
    figures = timing.interleaved(benchmark, lambda: None, {"same": lambda: None})
    assert benchmark.extra_info["calls_a_round"] > 100
    assert figures["seconds"]["candidate"]["min"] < 1e-5


def test_nothing_is_reported_where_nothing_was_timed() -> None:
    benchmark = Benchmark(enabled=False)
    assert timing.interleaved(benchmark, lambda: None, {"same": lambda: None}) == {}
    assert "ratios" not in benchmark.extra_info


def test_ratio_of_minima_and_of_rounds() -> None:
    found = timing.ratio([1.0, 2.0, 4.0], [2.0, 2.0, 8.0])
    assert found == {"of_minima": 0.5, "median": 0.5, "low": 0.5, "high": 0.75}


@pytest.mark.parametrize("got", [torch.tensor([1.0, 2.1]), torch.tensor([1.0, float("nan")]), torch.ones(3)])
def test_a_gate_fails_what_is_wrong(got: torch.Tensor) -> None:
    with pytest.raises(pytest.fail.Exception, match="it is wrong, so nothing is reported"):
        gates.gate("it", {"out": got}, {"out": torch.tensor([1.0, 2.0])}, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("problem", [Problem(2, 4, 2, 33, 16, 5), Problem(1, 2, 2, 7, 32, 1, gain=4.0)])
def test_the_references_are_right(problem: Problem, dtype: torch.dtype) -> None:
    for who, attention in (("concatenated", problem.concatenated()), ("merged", merged_flash)):
        assert check(problem, attention, dtype, backward=True, who=who) > 0
    check(problem, bare_sdpa, dtype, backward=True, who="bare SDPA", bare=True)


def test_a_wrong_reference_is_noticed() -> None:
    problem = Problem(2, 4, 2, 33, 16, 5)
    with pytest.raises(pytest.fail.Exception, match="merged is wrong"):
        check(problem, lambda *x: 1.001 * merged_flash(*x), torch.float32, backward=False, who="merged")


def test_a_bank_of_prefixes_is_one_problem_for_all() -> None:
    problem = Problem(3, 2, 2, 9, 16, 4, N=2)
    assert check(problem, problem.ours(), torch.float32, backward=True) < 1e-5
    check(problem, problem.concatenated(), torch.float32, backward=True, who="concatenated")
    assert answers(problem)["grad_prefix_key"].shape == (2, 2, 4, 16)


def test_useful_operations() -> None:
    problem = Problem(2, 3, 3, 4, 16, 5)  # queries see 6, 7, 8 and 9 keys
    assert problem.flops(backward=False) == 2 * 2 * 2 * 3 * 16 * 30
    assert problem.flops(backward=True) == 3.5 * problem.flops(backward=False)


def test_saved_bytes_count_each_block_once_and_no_input() -> None:
    x = torch.randn(8, 16, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x.exp()  # keeps its result
        return (y * y.t().t()).sum()  # keeps it again, through a view

    assert saved_bytes(forward) == 8 * 16 * 4
    assert saved_bytes(lambda: x * x, without=[x]) == 0


def test_the_stamp_names_no_host_and_no_folder() -> None:
    stamp = machine.stamp()
    assert {"cpu", "isa", "threads", "versions", "commit"} <= set(stamp)
    import os
    import platform

    assert platform.node() not in str(stamp)
    assert os.getcwd() not in str(stamp)
