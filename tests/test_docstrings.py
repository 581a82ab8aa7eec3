"""Every public name has an example in its docstring, and the examples are right."""

from __future__ import annotations

import doctest
import inspect
import io
from pathlib import Path
from typing import Any

import pytest
import torch

import prefixcore
from tests import tiny
from tests.examples import public


def test_the_public_names_are_found() -> None:
    assert {"prefixcore.attach", "prefixcore.nn.Prefix", "prefixcore.training.fit"} <= public().keys()
    assert "prefixcore.nn.PrefixTuningConfig" not in public()  # a second name of prefixcore.PrefixTuningConfig


@pytest.mark.parametrize(("name", "value"), public().items(), ids=list(public()))
def test_its_example(name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docstring = inspect.cleandoc(value.__doc__ or "")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"torch": torch, "prefixcore": prefixcore, "model": tiny.model(), "tokenizer": tiny.tokenizer()}
    examples = doctest.DocTestParser().get_doctest(docstring, names, name, inspect.getsourcefile(value), 0)
    assert "\nExamples:\n" in docstring, f"{name} has no section 'Examples:' in its docstring"
    assert examples.examples, f"{name} has no line that begins with >>> in its section 'Examples:'"
    report = io.StringIO()
    result = doctest.DocTestRunner(verbose=False).run(examples, out=report.write)
    assert result.failed == 0, report.getvalue()
