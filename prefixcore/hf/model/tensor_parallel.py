"""Models whose attention heads are shared out over processes: tensor parallelism, by transformers' `tp_plan`.

Virtual tokens are kilobytes, so every process has all of them and their optimizer's state. Its attention sees those of
its own heads alone, and the backward gives every process the gradient of all heads, by one exchange a step. So what a
process saves is whole, norms of gradients are those of the whole, a reparameterization works as elsewhere, and a
training goes on from a checkpoint with another number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters.weights import is_sharded


@dataclass(frozen=True)
class HeadGroup:
    """The processes that share the heads of a model.

    Attributes:
        mesh: theirs, of one dimension; plain data, so that a copy of the model has it too.
    """

    mesh: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadGroup:
        return self

    @property
    def size(self) -> int:
        """How many there are."""
        return int(self.mesh.size())

    @property
    def rank(self) -> int:
        """Which one this is."""
        return int(self.mesh.get_local_rank())

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The parts of all processes, beside each other along `dim`."""
        from torch.distributed import _functional_collectives as collectives

        flat = collectives.all_gather_tensor(x.contiguous().view(1, -1), 0, self.mesh)
        return torch.cat([part.view(x.shape) for part in collectives.wait_tensor(flat).unbind()], dim)

    def own(self, x: Tensor, dim: int) -> Tensor:
        """The part of this process of what is whole."""
        size = x.shape[dim] // self.size
        return x.narrow(dim, self.rank * size, size).contiguous()


def head_group(model: PreTrainedModel) -> HeadGroup | None:
    """The processes that share the heads of `model`; None: each of its heads is in one process."""
    mesh: Any = getattr(model, "_device_mesh", None)
    if mesh is None:  # parallelize_module of torch leaves no trace but in the weights
        mesh = next((getattr(p, "device_mesh", None) for p in model.parameters() if _is_split(p)), None)
    if mesh is None or "tp" not in (mesh.mesh_dim_names or ("tp",)):  # transformers before 5.18 names no dimension
        return None
    mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    return HeadGroup(mesh) if mesh.size() > 1 else None


def parts_unseen(model: PreTrainedModel) -> Any:
    """The mesh that transformers has shared out the weights of `model` over where they are no DTensors; None: none."""
    mesh: Any = getattr(model, "_device_mesh", None)
    if mesh is None or mesh.size() == 1 or mesh.mesh_dim_names is not None:
        return None
    return None if any(is_sharded(parameter) for parameter in model.parameters()) else mesh


def _is_split(parameter: Any) -> bool:
    """Whether it is in parts over a mesh that has a dimension "tp"."""
    if not (hasattr(parameter, "placements") and hasattr(parameter, "device_mesh")):
        return False
    return "tp" in (parameter.device_mesh.mesh_dim_names or ())


@torch.no_grad()
def agree_on(model: PreTrainedModel, ids: Sequence[int]) -> list[int]:
    """The ids of the first of the processes that share the heads of `model`, which all must read the same."""
    group = head_group(model)
    if group is None:
        return list(ids)
    shared = torch.tensor(list(ids), device=next(model.parameters()).device)
    torch.distributed.broadcast(shared, group=group.mesh.get_group(), group_src=0)
    found: list[int] = shared.tolist()
    return found


def own_heads(pairs: Sequence[tuple[Tensor, Tensor]], group: HeadGroup) -> list[tuple[Tensor, Tensor]]:
    """Of keys [Hkv, P, D] and values [Hkv, P, Dv] those of this process's heads, with the gradient of all heads."""
    flat: tuple[Tensor, ...] = _OwnHeads.apply(group, *[x for pair in pairs for x in pair])  # type: ignore[no-untyped-call]
    return list(zip(flat[::2], flat[1::2], strict=True))


class _OwnHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: HeadGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(group.own(x, 0) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """One exchange for all layers."""
        group: HeadGroup = ctx.group
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        parts = group.gather(flat[None], 0).split([grad.numel() for grad in grads], 1)
        whole = [
            part.reshape(group.size * grad.shape[0], *grad.shape[1:])  # heads of the first process come first
            for part, grad in zip(parts, grads, strict=True)
        ]
        return (None, *(x.to(grad.dtype) for x, grad in zip(whole, grads, strict=True)))
