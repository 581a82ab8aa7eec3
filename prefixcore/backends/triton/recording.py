"""What every path goes through, so that a plan can record whatever it does: memory, and calls of what is not ours.

A path is Python that runs once for each signature and is replayed from then on, so it may depend on the signature
alone: shapes, strides, alignment, dtypes and devices of its tensors, its options, and what `depends_on` names. It
never looks at what is in a tensor, and keeps none from one call to the next.

* Our kernels are launched by `kernels.launch.launch`.
* Memory, of outputs and scratch alike, comes from `empty`.
* PyTorch's own ops, also `contiguous()` and views, are called as ever: they are seen below the dispatcher.
* Any other function that works on a GPU (a vendor's, which the dispatcher does not know) is called by `call`.

This module does without Triton.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

_Result = TypeVar("_Result")


class Measured(NamedTuple):
    """A number among the arguments of a launch that is the size or a stride of a tensor."""

    of: Tensor
    kind: str  # "size" or "stride"
    dim: int


class Recorder(Protocol):
    """Who takes down what a path does."""

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any], /) -> Any:
        """Calls `function`, takes it down and returns what it returns."""

    def launch(
        self, kernel: Any, programs: int, arguments: dict[str, Any], options: dict[str, Any],
        measured: dict[str, Any] | None, /,
    ) -> None:  # fmt: skip
        """Launches `programs` programs of a Triton kernel and takes it down.

        `measured` says of a launch that is the same for all numbers of keys in a bucket which of its arguments are
        sizes or strides: a `Measured` in the place of each. None: it is not.
        """


class _Here(threading.local):
    recorder: Recorder | None = None


here = _Here()
"""Who records in this thread, if anybody does."""


def empty(*sizes: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous memory [*sizes] on the device of `like`, and in its dtype unless another one is named."""
    return like.new_empty(sizes, dtype=dtype)


def call(function: Callable[..., _Result], *arguments: Any, **keywords: Any) -> _Result:
    """`function(*arguments, **keywords)`, for what is no op of PyTorch's.

    Tensors stand among the arguments themselves, not inside of other objects but tuples and lists; so do those that
    it returns. It may write into those that it is given. It is called again at each replay, with other tensors of
    the same shapes and strides.
    """
    if here.recorder is None:
        return function(*arguments, **keywords)
    result: _Result = here.recorder.call(function, arguments, keywords)
    return result


_state: dict[str, Callable[[], Any]] = {}


def depends_on(name: str, read: Callable[[], Any]) -> None:
    """Has plans depend on what `read` returns, something hashable: a switch that a path reads beside its arguments.

    It is read at every call: quick.
    """
    global _readers
    _state[name] = read
    _readers = tuple(_state.values())


_readers: tuple[Callable[[], Any], ...] = ()


def state() -> tuple[Callable[[], Any], ...]:
    """What reads the switches that `depends_on` names."""
    return _readers
