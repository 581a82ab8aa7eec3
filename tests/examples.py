"""The examples that people read, in pages and in docstrings: where they stand, and running them."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

from prefixcore.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    """The Python code blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """The arguments of each command of a page that calls `prefixcore`; a backslash continues a line."""
    page = re.sub(r"\\\n *", "", page)
    lines = re.findall(rf"^prefixcore (?:{'|'.join(COMMANDS)})(?: .*)?$", page, re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines]


def execute(code: str, place: str, names: dict[str, Any]) -> dict[str, Any]:
    """Runs a block; `names` are those it finds, and afterwards those it has left."""
    exec(compile(code, place, "exec"), names)
    return names


def public() -> dict[str, Any]:
    """The public classes and functions, each under the shortest name that it is imported by."""
    found: dict[str, Any] = {}
    rooms = ("", ".ops", ".nn", ".training", ".training.tuning", ".adapters", ".audit", ".distill", ".serving.client")
    for room in (f"prefixcore{each}" for each in rooms):
        module = importlib.import_module(room)
        for name in module.__all__:
            value = getattr(module, name)
            if (inspect.isclass(value) or inspect.isfunction(value)) and value not in found.values():
                found[f"{room}.{name}"] = value
    return found
