"""What the processes of a pipeline must have in common, and the values that the first of them gives the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from ..bank.bank import Bank
    from .stage import ModelStage


def check_in_common(
    bank: Bank, own: tuple[int, int], number: int, prints: Mapping[str | None, Mapping[str, Any]], group: Any
) -> None:
    """Raises ValueError in every process, unless their stages make up one model with the same things attached to it.

    Args:
        bank: what is attached.
        own: the first layer of this stage, and the first that is no longer one.
        number: how many layers the model has.
        prints: the fingerprint of the model for each adapter.
        group: the processes, in the order of their stages.
    """
    count = dist.get_world_size(group)
    mine = (own, {name: _shapes(bank, name) for name in bank.adapters}, [_digests(each) for each in prints.values()])
    found: list[Any] = [None] * count
    dist.all_gather_object(found, mine, group=group)
    stages, shapes, weights = zip(*found, strict=True)
    if [first for first, _ in stages] != [0, *[end for _, end in stages[:-1]]] or stages[-1][1] != number:
        ranges = ", ".join(f"{first} to {end - 1}" for first, end in stages)
        raise ValueError(
            f"the stages of {count} processes have layers {ranges} of {number}, each once is expected: give every "
            "process the same starts"
        )
    if any(each != shapes[0] for each in shapes):
        raise ValueError(
            "the processes have attached different things to the model: attach the same configuration, of the same "
            "names, in every process"
        )
    if any(one and first and one != first for each in weights for one, first in zip(each, weights[0], strict=True)):
        raise ValueError(
            "the processes have models with different weights: load the same ones in every process, from the same "
            "files, or with one seed where they are drawn"
        )


def _shapes(bank: Bank, name: str | None) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in _tensors(bank, name)]


def _digests(found: Mapping[str, Any]) -> Mapping[str, str]:
    """The digests of the weights by dtype; none where a process could not read all weights."""
    return {} if found["left_out"] else found["weights"]


def _tensors(bank: Bank, name: str | None) -> list[Tensor]:
    adapter = bank.adapters[name]
    modules = (adapter.module, *adapter.handle.heads.trained.values())
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


@torch.no_grad()
def take_values_of_the_first(stage: ModelStage, group: Any) -> None:
    """Lets all stages have the values of the first: each has drawn its own."""
    if stage.count == 1:
        return
    everyone: Any = dist.group.WORLD
    first = dist.get_global_rank(group or everyone, 0)
    bank = stage.handle._bank
    for name in bank.adapters:
        for tensor in _tensors(bank, name):
            dist.broadcast(tensor.data, src=first, group=group)
