"""Fixtures of the tests of models."""

from __future__ import annotations

import pytest

from prefixcore.hf.bank import prompt_calls


@pytest.fixture(params=["once", "in each row"])
def prompts_computed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of a soft prompt: computed once for all rows, as in large models, and put into each row."""
    size = 0 if request.param == "once" else 2**60
    monkeypatch.setattr(prompt_calls, "WORTH", {"cpu": size, "gpu": size})
    return str(request.param)
