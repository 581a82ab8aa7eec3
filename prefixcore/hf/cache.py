"""The key/value cache of a call and of its output: `past_key_values` up to transformers 5.23, `cache` since."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def cache_argument(arguments: Mapping[str, Any]) -> Any:
    """The cache that a call is given, under either name; None: none."""
    return next((arguments[name] for name in ("cache", "past_key_values") if arguments.get(name) is not None), None)


def cache_output(output: Any) -> Any:
    """The cache that a model's output holds; None: none. Where the new name is there, reading the old one warns."""
    return output.cache if hasattr(output, "cache") else getattr(output, "past_key_values", None)
