"""What every benchmark shares: the stamp in the JSON, and the fixture that times in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import pytest
import torch

from . import machine, runs, timing

Measure = Callable[..., dict[str, Any]]
LEFT_OUT: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()


@pytest.hookimpl(optionalhook=True)  # the GPU's suite does without pytest-benchmark
def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """The stamp goes into the JSON beside what pytest-benchmark notes itself."""
    machine_info["prefixcore"] = machine.stamp()


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_benchmark_compare_machine_info(
    benchmarksession: Any, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> None:
    """Says in a line each what two runs differ in. pytest-benchmark's own check, which comes next and would print both
    machines whole because of their load, is given nothing to find."""
    stamp, before = machine_info["prefixcore"], compared_benchmark["machine_info"].get("prefixcore", {})
    for name in set(runs.SITTINGS) - {"commit"}:  # other code is what is to be compared
        if before.get(name) != stamp[name]:
            text = f"compared with a run of another {name}: {before.get(name)}, now {stamp[name]}"
            benchmarksession.logger.warning(text)
    compared_benchmark["machine_info"] = machine_info


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """What was left out stands beside the benchmarks: in their list, pytest-benchmark would look for its times."""
    output_json["left_out"] = config.stash.get(LEFT_OUT, [])


@pytest.fixture
def measure(benchmark: Any) -> Measure:
    """`measure(table, case, candidate, references, **facts)`: times in turns and notes the row of a table.

    `table` names the table of bench/docs/results.md that the figures go to, `case` is what the row is about and
    `facts` are further figures that were not timed here.
    """

    def run(
        table: str,
        case: Mapping[str, Any],
        candidate: timing.Call,
        references: Mapping[str, timing.Call],
        **facts: Any,
    ) -> dict[str, Any]:
        benchmark.group = table
        benchmark.extra_info.update(table=table, case=dict(case), **facts)
        return timing.interleaved(benchmark, candidate, references)

    return run


@pytest.fixture
def note(benchmark: Any) -> Callable[..., None]:
    """`note(table, case, call, **facts)`: notes figures that are not times; `call` is run once more, timed."""

    def run(table: str, case: Mapping[str, Any], call: timing.Call, **facts: Any) -> None:
        benchmark.group = table
        benchmark.extra_info.update(table=table, case=dict(case), **facts)
        benchmark.pedantic(call, rounds=1, iterations=1)

    return run


@pytest.fixture
def leave_out(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., NoReturn]:
    """`leave_out(table, case, reason)`: skips, and has the table say so."""

    def run(table: str, case: Mapping[str, Any], reason: str) -> NoReturn:
        why = {"table": table, "case": dict(case), "skipped": reason}
        request.config.stash.setdefault(LEFT_OUT, []).append({"fullname": benchmark.fullname, "extra_info": why})
        benchmark.disabled = True  # nothing was timed, so that pytest-benchmark has no row of it
        benchmark.pedantic(lambda: None)
        pytest.skip(reason)

    return run


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
