"""Argument checks: an error says what was expected, what came and, where it helps, how to mend it."""

from __future__ import annotations

from typing import Any


def expect(condition: bool, kind: type[Exception], name: str, expected: str, got: Any, hint: str = "") -> None:
    """Raises ``kind`` unless ``condition`` holds."""
    if not condition:
        raise kind(f"{name}: expected {expected}, got {got}" + (f"; {hint}" if hint else ""))
