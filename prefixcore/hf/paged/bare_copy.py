"""A copy of an attached model with nothing attached and the same weights, for the thread that batches requests.

That thread sets the attention and the mode of the model that it is given, and the attached model goes on meanwhile.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attention.patch import ATTACHMENT, MODULE, changing_modules

if TYPE_CHECKING:
    from ..bank.bank import Bank

KEPT = "_cached_continuous_batching_manager"
"""Where transformers keeps a manager for a next session; it holds threads, and cannot be copied."""


def bare_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` that shares its parameters and buffers, and carries nothing of ours."""
    with changing_modules:
        memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
        attached: Bank = model.__dict__[ATTACHMENT]
        memo |= {id(ours): {} for ours in (attached.adapters, attached.residency)}
        memo |= {id(weights): weights for weights in _offloaded(model)}
        if MODULE in model._modules:
            memo[id(model._modules[MODULE])] = nn.Module()
        if KEPT in model.__dict__:
            memo[id(model.__dict__[KEPT])] = None
        originals = {module for module in model.modules() if module._modules}  # others compute the same in a copy
        twin: PreTrainedModel = copy.deepcopy(model, memo)
    bank: Bank = twin.__dict__[ATTACHMENT]
    bank.patch.frozen = []  # the parameters are those of the model, which keep their flags
    bank.patch.undo()
    twin.__dict__.pop(KEPT, None)
    for name, module in twin.named_modules():
        if _calls(module.__dict__.get("forward"), originals, set()):
            _forget_closure(name, module, {twin, twin.base_model, bank.decoder})
    return twin


def state_of(model: PreTrainedModel) -> list[Any]:
    """What a copy that shares the weights does not share, and which values the weights have.

    Such as whether PEFT's LoRA is switched on, or merged into the weights, and which hooks there are.
    """
    found: list[Any] = []
    with changing_modules:
        for name, module in model.named_modules():
            if name.partition(".")[0] != MODULE:
                hooks = [*module._forward_hooks, *module._forward_pre_hooks]
                plain = {
                    key: repr(value) for key, value in vars(module).items() if key != "training" and _is_plain(value)
                }
                tensors = [(id(t), _version(t)) for t in chain(module.parameters(False), module.buffers(False))]
                found.append((name, type(module), hooks, plain, tensors))
    return found


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # tensors of inference mode count no changes


def _offloaded(model: nn.Module) -> Iterator[Any]:
    """Where accelerate keeps the weights that it brings to the device for a call."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            if getattr(each, "weights_map", None) is not None:
                yield each.weights_map


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set)):
        return all(_is_plain(each) for each in value)
    if isinstance(value, dict):
        return _is_plain([*value, *value.values()])
    return value is None or isinstance(value, (bool, int, float, str))


def _calls(function: Any, modules: set[nn.Module], seen: set[int]) -> bool:
    """Whether a function has one of `modules` from outside, also by way of others: copying does not reach there."""
    if isinstance(function, nn.Module):
        return function in modules
    if not callable(function) or isinstance(function, type) or id(function) in seen:
        return False
    seen.add(id(function))
    cells = getattr(function, "__closure__", None) or ()
    held = [cell.cell_contents for cell in cells if cell != type(cell)()]  # but empty ones
    held += [getattr(function, name, None) for name in ("__func__", "__self__", "func")]
    held += [*getattr(function, "args", ()), *getattr(function, "__dict__", {}).values()]
    return any(_calls(each, modules, seen) for each in held)


def _forget_closure(name: str, module: nn.Module, wrapped: set[Any]) -> None:
    """Takes away a function around the forward of the module that `module` is a copy of.

    TRL puts one around the forward of the model, for the losses of its training, and accelerate for mixed precision.
    """
    if module not in wrapped:
        raise NotImplementedError(
            "continuous batching (generate_batch) needs a copy of the model without virtual tokens, but the forward of "
            f"{name} is a function that calls the model itself: call generate on padded batches"
        )
    del module.__dict__["forward"]
