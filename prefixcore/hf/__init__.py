"""Prefixes and soft prompts on transformers models: attach, train, generate, save, load, detach."""

from .attaching import attach
from .families import FAMILIES
from .handle import Handle, attached
from .loading import load
from .packing import PackedCollator

__all__ = ["FAMILIES", "Handle", "PackedCollator", "attach", "attached", "load"]
