"""Argument errors: what was expected, what came and, where it helps, how to mend it.

Checks are written ``if bad: raise wrong(...)`` so that a good call never pays for the words.
"""

from __future__ import annotations

from typing import Any


def wrong(kind: type[Exception], name: str, expected: str, got: Any, hint: str = "") -> Exception:
    """The exception to raise for the argument ``name``."""
    return kind(f"{name}: expected {expected}, got {got}" + (f"; {hint}" if hint else ""))
