"""Gradient checkpointing, with which PEFT's prefix does not work and ours does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


@contextmanager
def checkpointing_hidden(model: nn.Module) -> Iterator[None]:
    """A block in which no module of `model` says that its gradient checkpointing is on: PEFT makes no prefix then."""
    modules: list[Any] = [m for m in model.modules() if m.__dict__.get("gradient_checkpointing", False)]
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


def checkpoint_without_reentrance(modules: Iterable[nn.Module]) -> None:
    """Makes checkpointing non-reentrant where it was turned on without a word about it, which torch takes as reentrant.

    As PEFT's `prepare_model_for_kbit_training` does. Reentrant checkpointing gives a prefix no gradient.
    """
    for module in modules:
        function = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(function, partial) and function.keywords.get("use_reentrant") is None:
            module._gradient_checkpointing_func = partial(  # type: ignore[assignment]
                function.func, *function.args, **{**function.keywords, "use_reentrant": False}
            )
