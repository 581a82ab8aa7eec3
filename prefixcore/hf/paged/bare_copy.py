"""A copy of an attached model with nothing attached and the same weights, for the thread that batches requests.

That thread sets the attention and the mode of the model that it is given, and the attached model goes on meanwhile.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from ..attention.patch import ATTACHMENT

if TYPE_CHECKING:
    from ..bank.bank import Bank

_MANAGER = "_cached_continuous_batching_manager"
"""Where transformers keeps a manager for a next session; it holds threads, and cannot be copied."""


def bare_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` that shares its parameters and buffers, and carries nothing of ours."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    if _MANAGER in model.__dict__:
        memo[id(model.__dict__[_MANAGER])] = None
    twin: PreTrainedModel = copy.deepcopy(model, memo)
    bank: Bank = twin.__dict__[ATTACHMENT]
    bank.patch.frozen = []  # the parameters are those of the model, which keep their flags
    bank.patch.undo()
    twin.__dict__.pop(_MANAGER, None)
    originals = set(model.modules())
    for name, module in twin.named_modules():
        if _calls(module.__dict__.get("forward"), originals):
            _forget_closure(name, module, {twin, twin.base_model, bank.decoder})
    return twin


def _calls(forward: Any, modules: set[nn.Module]) -> bool:
    """Whether a function holds one of `modules`, or a method of one: copying does not reach into closures."""
    cells = getattr(getattr(forward, "__func__", forward), "__closure__", None) or ()
    held = [cell.cell_contents for cell in cells if cell != type(cell)()]  # but empty ones
    owners = [getattr(each, "__self__", getattr(each, "module", each)) for each in held]
    return any(isinstance(owner, nn.Module) and owner in modules for owner in owners)


def _forget_closure(name: str, module: nn.Module, wrapped: set[Any]) -> None:
    """Takes away a function around the forward of the module that `module` is a copy of.

    TRL puts one around the forward of the model, for the losses of its training.
    """
    if module not in wrapped:
        raise NotImplementedError(
            "continuous batching (generate_batch) needs a copy of the model without virtual tokens, but the forward of "
            f"{name} is a function that calls the model itself: call generate on padded batches"
        )
    del module.__dict__["forward"]
