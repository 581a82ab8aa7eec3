"""Nothing that was done to a model before shows in what it answers: random histories (`histories.py`)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from .histories import MAKERS, History

_SETTINGS: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate],  # a history that fails is short enough to read, and shrinking it takes minutes
}


def run(history: type[History], examples: int, steps: int) -> None:
    """Lives through histories, the same each time; most calls have an answer, so that there is one to compare."""
    history.answered.clear()
    few = settings(max_examples=examples, stateful_step_count=steps, derandomize=True, **_SETTINGS)
    run_state_machine_as_test(history, settings=few)
    assert history.answered[True] > 2 * history.answered[False], history.answered


@pytest.mark.filterwarnings("ignore")
def test_histories() -> None:
    run(History, examples=6, steps=8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", MAKERS)
def test_many_histories(family: str) -> None:
    class Of(History):
        families = (family,)
        ways = (*History.ways, "batched") if family in ("llama", "qwen3", "gpt2") else History.ways

    run(Of, examples=20, steps=16)
