"""The GPU's own suite: only where a device is named, so that `make bench` on a CPU has nothing to do with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from bench import timing

from . import clock, device

collect_ignore_glob = [] if device.NAME else ["test_*"]

Measure = Callable[..., dict[str, Any]]
LeftOut = Callable[[str, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", type=Path, help="the JSON file that the figures go to")


if device.NAME:
    from .figures import Figures

    KEPT = pytest.StashKey[Figures]()

    def pytest_configure(config: pytest.Config) -> None:
        config.stash[KEPT] = Figures(config.getoption("--figures", default=None))

    def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
        """What an earlier run measured before it was stopped is not measured again."""
        before = [item for item in items if config.stash[KEPT].has(item.name)]
        config.hook.pytest_deselected(items=before)
        items[:] = [item for item in items if item not in before]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(item: pytest.Item) -> Any:
        report = yield
        if report.failed:
            message = report.longrepr.reprcrash.message if hasattr(report.longrepr, "reprcrash") else report.longrepr
            item.config.stash[KEPT].failed(item.name, str(message).split("\n", 1)[0][:400])
        return report

    def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.config.stash[KEPT].finish()
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.stash[KEPT].content["rows"]:
            session.exitstatus = pytest.ExitCode.OK  # everything had been measured


@pytest.fixture(scope="session", autouse=True)
def triton_backend() -> Iterator[None]:
    """In a rehearsal the triton backend takes CPU tensors, its kernels interpreted."""
    with device.triton_backend():
        yield


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> Measure:
    """`measure(table, case, candidate, references, **facts)`: times in turns; the row goes to the part's file.

    `seconds`: the clock; unless given the GPU's time, with nothing in its L2 cache when a call begins. Where the
    candidate `moves` so many bytes, the row has the share of a copy's rate.
    """

    def run(
        table: str,
        case: Mapping[str, Any],
        candidate: timing.Call,
        references: Mapping[str, timing.Call],
        *,
        seconds: clock.Clock = clock.cold_seconds,
        moves: int | None = None,
        **facts: Any,
    ) -> dict[str, Any]:
        figures = clock.interleaved({"candidate": candidate, **references}, seconds)
        if moves is not None:
            figures["share_of_copy"] = moves / figures["seconds"]["candidate"]["min"] / clock.copy_rate()
        switched = {"with": device.SWITCHED} if device.SWITCHED else {}
        request.config.stash[KEPT].row(request.node.name, table, {**case, **switched}, **figures, **facts)
        return figures

    return run


@pytest.fixture
def left_out(request: pytest.FixtureRequest) -> LeftOut:
    """`left_out(what, why)`: has the part's file say what was not measured, and why; the test goes on."""

    def run(what: str, why: str) -> None:
        request.config.stash[KEPT].left_out(f"{request.node.name}, {what}", why)

    return run
