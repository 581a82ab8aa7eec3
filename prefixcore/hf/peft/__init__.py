"""PEFT models on prefixcore's ops, in place: the same parameters, the same files, the same numbers."""

from .accelerate import accelerate
from .accelerated import Accelerated

__all__ = ["Accelerated", "accelerate"]
