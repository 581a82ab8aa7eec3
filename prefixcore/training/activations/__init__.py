"""What the layers below a prefix make of each example, computed once and kept for the epochs that follow."""

from __future__ import annotations

from .cached import CachedActivations, cache_activations
from .check import CacheError

__all__ = ["CacheError", "CachedActivations", "cache_activations"]
