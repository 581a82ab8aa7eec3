"""Calls of what is not ours, in a plan: the function and its arguments with places for the tensors, by number.

The C++ calls them back by way of the op `prefixcore::call_of_plan`, which is implemented here. It cannot call PyTorch's
ops itself: its stable interface does not know the numbers (`SymInt`) that fused attention takes, before torch 2.13.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

_Run = Callable[[Sequence[Tensor]], Any]

_runs: dict[int, _Run] = {}
_numbers = itertools.count(1)


def add(function: Callable[..., Any], arguments: Sequence[Any], keywords: dict[str, Any]) -> tuple[int, list[Tensor]]:
    """Its number, and the tensors among its arguments, in the order in which `run` takes them."""
    leaves, structure = pytree.tree_flatten((tuple(arguments), keywords))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[place] for place in places]
    constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    number = next(_numbers)
    if len(leaves) == len(arguments) and not keywords:
        _runs[number] = _plain(function, constants, places, {})
    elif not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(keywords)) and not any(
        isinstance(x, list | tuple | dict) for x in arguments
    ):
        _runs[number] = _plain(function, constants[: len(arguments)], places, dict(keywords))
    else:
        _runs[number] = _nested(function, constants, places, structure)
    return number, tensors


def _plain(function: Callable[..., Any], constants: list[Any], places: list[int], keywords: dict[str, Any]) -> _Run:
    def run(tensors: Sequence[Tensor]) -> Any:
        arguments = constants.copy()
        for place, x in zip(places, tensors, strict=False):  # one more where it takes none
            arguments[place] = x
        return function(*arguments, **keywords)

    return run


def _nested(function: Callable[..., Any], constants: list[Any], places: list[int], structure: Any) -> _Run:
    def run(tensors: Sequence[Tensor]) -> Any:
        leaves = constants.copy()
        for place, x in zip(places, tensors, strict=False):
            leaves[place] = x
        arguments, keywords = pytree.tree_unflatten(leaves, structure)
        return function(*arguments, **keywords)

    return run


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors that a call has returned, in their order; what else it returns is a constant of the signature."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, tuple) and not any(isinstance(x, list | tuple | dict) for x in result):
        return [x for x in result if isinstance(x, Tensor)]
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def run(number: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Calls it again with these tensors. `torch.ops.prefixcore.call_of_plan`."""
    return tensors_of(_runs[number](tensors))


def forget(numbers: Iterable[int]) -> None:
    for number in numbers:
        _runs.pop(number, None)
