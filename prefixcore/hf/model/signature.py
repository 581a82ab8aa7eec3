"""The arguments of a module's forward: their names, and those of a call by name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def argument_names(module: nn.Module) -> list[str]:
    """The names of the arguments of `module.forward` in order, `*args` and `**kwargs` left out."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, p in inspect.signature(module.forward).parameters.items() if p.kind not in kinds]


def takes_keywords(module: nn.Module) -> bool:
    """Whether `module.forward` takes `**kwargs`."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())


def as_keywords(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name; TypeError: more positional ones than the forward takes."""
    if len(args) > len(names):
        raise TypeError(f"forward takes {len(names)} positional arguments, got {len(args)}")
    return {**dict(zip(names, args, strict=False)), **kwargs}
