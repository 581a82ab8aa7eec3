"""A failure that is a bug shows where it is, and is not taken for the user's."""

from __future__ import annotations

import pytest

from prefixcore.cli import failures
from prefixcore.cli import train as train_command

from .commands import NEW


def test_bugs_still_show_where_they_are(train, monkeypatch):
    for error in (ValueError("a bug"), RuntimeError("a bug"), RecursionError("a bug"), KeyError("a bug")):
        monkeypatch.setattr(train_command, "read_examples", lambda arguments, error=error: _raise(error))
        with pytest.raises(type(error), match="a bug"):
            train(*NEW)


def _raise(error):
    raise error


def test_what_is_not_installed_is_named():
    assert "pip install" in failures.message(ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib"))
    assert failures.message(ModuleNotFoundError("No module named 'x'", name="prefixcore.x")) is None
