"""The GPU's own suite: only where a device is named, so that `make bench` on a CPU has nothing to do with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from bench import timing

from . import clock, device

collect_ignore_glob = [] if device.NAME else ["test_*"]

Measure = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session", autouse=True)
def triton_backend() -> Iterator[None]:
    """In a rehearsal the triton backend takes CPU tensors, its kernels interpreted."""
    with device.triton_backend():
        yield


@pytest.fixture
def measure(note: Callable[..., None]) -> Measure:
    """``measure(table, case, candidate, references, goals, **facts)``: GPU time in turns.

    ``goals``: the most that a ratio may be, by reference; under ``copy``, the least share of a copy's rate, for the
    bytes that the candidate ``moves``. ``cold``: nothing is in the L2 cache when a call begins.
    """

    def run(
        table: str,
        case: Mapping[str, Any],
        candidate: timing.Call,
        references: Mapping[str, timing.Call],
        goals: Mapping[str, float],
        *,
        cold: bool = True,
        moves: int | None = None,
        **facts: Any,
    ) -> dict[str, Any]:
        figures = clock.interleaved({"candidate": candidate, **references}, cold=cold)
        if moves is not None:
            figures["share_of_copy"] = moves / figures["seconds"]["candidate"]["min"] / clock.copy_rate()
        note(
            table, case, lambda: None, **figures, goals=dict(goals), device=device.describe(), real=device.REAL, **facts
        )
        return figures

    return run
