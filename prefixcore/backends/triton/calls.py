"""Calls of what is not ours, in a plan: the function and its arguments with places for the tensors, by number.

The C++ calls them back by way of the op `prefixcore::call_of_plan`, which is implemented here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree


class _Place(NamedTuple):
    """Where a tensor stands among the arguments."""

    number: int


class _Template(NamedTuple):
    function: Callable[..., Any]
    leaves: list[Any]
    structure: Any


_templates: dict[int, _Template] = {}
_numbers = itertools.count(1)


def add(function: Callable[..., Any], arguments: Any, keywords: Any) -> tuple[int, list[Tensor]]:
    """Its number, and the tensors among its arguments, in the order in which `run` takes them."""
    leaves, structure = pytree.tree_flatten((arguments, keywords))
    tensors: list[Tensor] = []
    places: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            places.append(_Place(len(tensors)))
            tensors.append(leaf)
        else:
            places.append(leaf)
    number = next(_numbers)
    _templates[number] = _Template(function, places, structure)
    return number, tensors


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors that a call has returned, in their order; what else it returns is a constant of the signature."""
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def run(number: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Calls it again with these tensors. `torch.ops.prefixcore.call_of_plan`."""
    template = _templates[number]
    leaves = [tensors[leaf.number] if type(leaf) is _Place else leaf for leaf in template.leaves]
    arguments, keywords = pytree.tree_unflatten(leaves, template.structure)
    result = template.function(*arguments, **keywords)
    return [result] if isinstance(result, Tensor) else tensors_of(result)


def forget(numbers: Iterable[int]) -> None:
    for number in numbers:
        _templates.pop(number, None)
