"""A method of a model that is wrapped on the instance, so that no way of calling it leaves the wrapping out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..batch.tasks import TASK_IDS

Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""`around(method, args, kwargs)` calls `method` once and returns what it returns."""


class WrappedMethod:
    """What stands in `module.forward` while something is attached: `module(...)` and `module.forward(...)` are one.

    Hooks would be left out by `module.forward(...)`, which libraries call. An attribute of the instance is not, and is
    copied and pickled along with the module.

    Args:
        module: the module.
        name: the method, "forward" or "generate".
        around: what to do in its place.
    """

    def __init__(self, module: nn.Module, name: str, around: Around) -> None:
        self.module = module
        self.around: Around | None = around
        self.inner = module.__dict__.get(name)  # another library's; accelerate puts one here too
        self.__name__ = name
        object.__setattr__(module, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.module:  # accelerate's unwrap_model binds what it finds to the model
            args = args[1:]
        if self.around is None:
            return self.original(*args, **kwargs)
        return self.around(self.original, args, kwargs)

    __code__ = __call__.__code__  # torch.export names its inputs by where this is

    @property
    def original(self) -> Callable[..., Any]:
        """The method that is wrapped."""
        return partial(getattr(type(self.module), self.__name__), self.module) if self.inner is None else self.inner

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the method, and `task_ids`: Trainer reads there which columns of a dataset a model takes."""
        signature = inspect.signature(self.original)
        names = getattr(getattr(self.around, "__self__", None), "arguments", [TASK_IDS])
        parameters = [p for p in signature.parameters.values() if p.name not in names]
        added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
        at = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        return signature.replace(parameters=[*parameters[:at], *added, *parameters[at:]])

    def undo(self) -> None:
        """Takes the wrapping away; where another library has wrapped this in turn, it passes calls on from now on."""
        self.around = None
        if self.module.__dict__.get(self.__name__) is not self:
            return
        if self.inner is None:
            del self.module.__dict__[self.__name__]
        else:
            object.__setattr__(self.module, self.__name__, self.inner)
