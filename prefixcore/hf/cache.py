"""The cache of a call and of its output: ``past_key_values`` to transformers up to 5.23, ``cache`` since."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache that a call is given, under whichever name, or None."""
    return next((arguments[name] for name in ("cache", "past_key_values") if arguments.get(name) is not None), None)


def cache_in(output: Any) -> Any:
    """The cache that a model's output holds, or None. Where the new name is there, the old one would warn."""
    return output.cache if hasattr(output, "cache") else getattr(output, "past_key_values", None)
