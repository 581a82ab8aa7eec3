"""What an adapter's module makes in a call: with a graph where it trains, and else without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..model.devices import device_of
from ..model.sharded import averaged, data_meshes
from .attached import Attached
from .beside_peft import check_not_frozen

if TYPE_CHECKING:
    from .bank import Bank


def evaluate(bank: Bank, adapter: Attached) -> Any:
    """What the module makes, without a graph where none is wanted."""
    if torch.is_grad_enabled() and bank.model.training:
        check_not_frozen(bank, adapter)
    trains = adapter.trains
    if trains and (torch.is_grad_enabled() or getattr(adapter.module, "is_reparameterized", False)):
        _check_not_offloaded(bank, adapter)
    if torch.is_grad_enabled() and trains:
        values = adapter.module()
        meshes = _unknown_to(bank, adapter)
        return averaged(values, meshes) if meshes else values
    if torch.compiler.is_compiling():
        return _detach(adapter.module())
    with torch.inference_mode(False), torch.no_grad():  # a later forward may need them in a graph
        values = _detach(adapter.module())
        if adapter.is_kept:
            return values
        return bank.residency.get(adapter.uid, values, device_of(bank.model), adapter.version)


def _check_not_offloaded(bank: Bank, adapter: Attached) -> None:
    """Raises RuntimeError where accelerate has offloaded what is trained: a gradient would be a copy's, and dropped."""
    if any(_is_offloaded(module) for module in adapter.module.modules()):
        raise RuntimeError(
            "the virtual tokens were offloaded with the model they are attached to, so what trains them would get no "
            f"gradients: offload {type(bank.model).__name__} first (device_map, cpu_offload, disk_offload), then attach"
        )


def _is_offloaded(module: torch.nn.Module) -> bool:
    hook = module.__dict__.get("_hf_hook")
    return hook is not None and any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,)))


def _unknown_to(bank: Bank, adapter: Attached) -> list[Any]:
    """The processes that FSDP2 shares the model out to, where it does not know of the adapter, which trains."""
    if not bank.data_meshes and not torch.compiler.is_compiling():
        bank.data_meshes = data_meshes(bank.model)  # it may have come after us
    if not bank.data_meshes or not any(p is mine for p in adapter.module.parameters() for mine in adapter.trained):
        return []  # FSDP puts parameters of its own in place of those that it knows
    if len(bank.adapters) > 1 or bank.stays:
        raise NotImplementedError(
            "several adapters are attached to a model in parts, and FSDP does not know of them, so their gradients "
            "cannot be averaged: attach them before fully_shard, and let it have the model as a whole"
        )
    return bank.data_meshes


def _detach(values: Any) -> Any:
    return values.detach() if isinstance(values, Tensor) else [(key.detach(), value.detach()) for key, value in values]
