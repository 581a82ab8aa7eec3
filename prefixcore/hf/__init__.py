"""Prefixes and soft prompts on transformers models: attach, train, generate, save, load, detach."""

from .attaching import attach
from .families import FAMILIES
from .handle import Handle, attached
from .loading import load
from .packing import PackedCollator
from .prompt_bank import PromptBank

__all__ = ["FAMILIES", "Handle", "PackedCollator", "PromptBank", "attach", "attached", "load"]
