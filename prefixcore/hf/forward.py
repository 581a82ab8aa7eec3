"""A module whose `forward` is wrapped, so that no way of calling it leaves the wrapping out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from .tasks import TASK_IDS

Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""`around(forward, args, kwargs)` calls `forward` once and returns the output."""


class WrappedForward:
    """What stands in `module.forward` while something is attached: `module(...)` and `module.forward(...)` are one.

    Hooks would be left out by `module.forward(...)`, which libraries call. An attribute of the instance is not, and is
    copied and pickled along with the module.

    Args:
        module: the module.
        around: what to do in place of its forward.
    """

    def __init__(self, module: nn.Module, around: Around) -> None:
        self.module = module
        self.around: Around | None = around
        self.inner = module.__dict__.get("forward")  # another library's; accelerate puts one here too
        self.__name__ = "forward"
        object.__setattr__(module, "forward", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.around is None:
            return self.original(*args, **kwargs)
        return self.around(self.original, args, kwargs)

    @property
    def original(self) -> Callable[..., Any]:
        """The forward that is wrapped."""
        return partial(type(self.module).forward, self.module) if self.inner is None else self.inner

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the forward, and `task_ids`: generate and Trainer read there which arguments a model takes."""
        signature = inspect.signature(self.original)
        parameters = [p for p in signature.parameters.values() if p.name != TASK_IDS]
        task_ids = inspect.Parameter(TASK_IDS, inspect.Parameter.KEYWORD_ONLY, default=None)
        at = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        return signature.replace(parameters=[*parameters[:at], task_ids, *parameters[at:]])

    def undo(self) -> None:
        """Takes the wrapping away; where another library has wrapped this in turn, it passes calls on from now on."""
        self.around = None
        if self.module.__dict__.get("forward") is not self:
            return
        if self.inner is None:
            del self.module.__dict__["forward"]
        else:
            object.__setattr__(self.module, "forward", self.inner)
