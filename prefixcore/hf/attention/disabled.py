"""What is disabled in the running thread, and the attention that a model computes with meanwhile.

A model and its configuration belong to all threads, so neither is changed while one of them has its virtual tokens
disabled: the configuration goes on naming our attention, which calls the one that the model had before.

Threads, and not contexts (`contextvars`): compiled code can be guarded by what a thread holds, but not by a context.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AttentionInterface

if TYPE_CHECKING:
    from .patch import Patch

OTHER_ATTENTION = "prefixcore_other_attention"
"""The argument of a disabled forward that names the attention to compute with.

It travels with the forward's other arguments, so that gradient checkpointing, which runs a layer again in the
backward, perhaps in another thread and after the block has ended, computes what the forward did.
"""


class _Disabled(threading.local):
    def __init__(self) -> None:  # runs in each thread: compiled code is guarded by what an instance holds
        self.patches: tuple[Patch, ...] = ()


_disabled = _Disabled()


@contextmanager
def disable(patch: Patch) -> Iterator[None]:
    """A block in which the thread that runs it computes as if this patch had not been made."""
    _disabled.patches = (*_disabled.patches, patch)
    try:
        yield
    finally:
        patches = list(_disabled.patches)
        if patch not in patches:
            raise RuntimeError("a disabled() block has to end in the thread in which it began")
        patches.remove(patch)
        _disabled.patches = tuple(patches)


def is_disabled(patch: Patch | None) -> bool:
    """Whether the running thread has this patch disabled."""
    return any(each is patch for each in _disabled.patches)


def other_attention(config: Any) -> str | None:
    """The attention that a model with this configuration has in the running thread; None: the one it names."""
    for patch in _disabled.patches:
        for each, name in patch.attention:
            if each is config:
                return name or "eager"
    return None


def find_attention(name: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function of this name, as `module` finds it.

    Raises:
        NotImplementedError: the module's file has no eager attention where transformers' models have theirs.
    """
    for cls in type(module).__mro__:
        modeling = sys.modules[cls.__module__]
        if name == "eager":
            if hasattr(modeling, "eager_attention_forward"):
                return modeling.eager_attention_forward
        elif hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):  # a family may have functions of its own
            return modeling.ALL_ATTENTION_FUNCTIONS[name]
    if name == "eager":
        raise NotImplementedError(
            f"{type(module).__name__} has no eager_attention_forward, which disabled() needs: detach instead"
        )
    return AttentionInterface()[name]


class NamedAttention:
    """An attention module whose configuration names an attention: what an attention function reads the name from."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module = module
        config: Any = copy.copy(module.config)
        config._attn_implementation_internal = name
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
