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


@pytest.mark.filterwarnings("ignore")
def test_histories() -> None:
    few = settings(max_examples=6, stateful_step_count=8, derandomize=True, **_SETTINGS)
    run_state_machine_as_test(History, settings=few)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", MAKERS)
def test_many_histories(family: str) -> None:
    class Of(History):
        families = (family,)
        ways = (*History.ways, "batched") if family in ("llama", "qwen3", "gpt2") else History.ways

    run_state_machine_as_test(
        Of, settings=settings(max_examples=8, stateful_step_count=16, derandomize=True, **_SETTINGS)
    )
