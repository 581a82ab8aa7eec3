"""Fixtures of the tests of models."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from transformers.models.t5 import modeling_t5

from prefixcore.hf.bank import prompt_calls

T5_IS_REACHED = hasattr(modeling_t5, "ALL_ATTENTION_FUNCTIONS")
"""From transformers 5.15 on. Before, T5 computes attention by itself, and a prefix on it is refused in words."""


@pytest.fixture(params=["once", "in each row"])
def prompts_computed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of a soft prompt: computed once for all rows, as in large models, and put into each row."""
    size = 0 if request.param == "once" else 2**60
    monkeypatch.setattr(prompt_calls, "WORTH", {"cpu": size, "gpu": size})
    return str(request.param)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Lets a test end where T5 is refused for that reason."""
    try:
        return (yield)
    except NotImplementedError as error:
        if T5_IS_REACHED or "T5ForConditionalGeneration calls attention 0 times in its encoder" not in str(error):
            raise
        pytest.xfail("T5's attention is reached from transformers 5.15 on")
