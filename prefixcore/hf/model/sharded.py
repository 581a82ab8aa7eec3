"""Models whose weights FSDP2 has in parts, each process with a part and a batch of its own.

What is attached before `fully_shard` is FSDP's to share out and to average. What is attached later (a model that is in
parts from the moment it is loaded), or left out of it (`ignored_params`), FSDP does not know of, so its gradient is
averaged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .devices import device_of


def data_meshes(model: nn.Module) -> list[Any]:
    """The processes over which FSDP2 shares out the weights of `model`, a mesh for each dimension; none elsewhere."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule

    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return []
    meshes = (getattr(parameter, "device_mesh", None) for parameter in model.parameters())
    # Of weights that are in parts over the heads too, it is the larger one; some are whole for the moment.
    mesh: Any = max((mesh for mesh in meshes if mesh is not None), key=lambda mesh: mesh.ndim, default=None)
    if mesh is None:
        return []
    if mesh.ndim == 1:
        return [mesh] if mesh.size() > 1 and mesh.mesh_dim_names != ("tp",) else []
    names = mesh.mesh_dim_names
    if names is None:  # fully_shard over two dimensions: replicas, and the parts of each
        return [mesh]
    return [mesh[name] for name in names if name != "tp" and mesh[name].size() > 1]


def reshard(model: nn.Module) -> None:
    """Frees the parts of other processes that FSDP2 keeps behind a forward without a backward; nothing elsewhere.

    The next forward would read them as they were, also after a step of the optimizer, and the parameters that the model
    has meanwhile are not those with the gradients.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def agree_on_values(module: nn.Module, meshes: Sequence[Any]) -> None:
    """Lets every process of `meshes` have the values of the first one: each has drawn its own."""
    for tensor in [*module.parameters(), *module.buffers()]:
        for mesh in meshes:
            torch.distributed.broadcast(tensor.data, group=mesh.get_group(), group_src=0)


def averaged(values: Any, meshes: Sequence[Any]) -> Any:
    """A tensor, or pairs of them, whose gradient is the mean of the gradients of all processes of `meshes`."""
    if isinstance(values, Tensor):
        return _Averaged.apply(meshes, values)[0]  # type: ignore[no-untyped-call]
    flat = _Averaged.apply(meshes, *[x for pair in values for x in pair])  # type: ignore[no-untyped-call]
    return list(zip(flat[::2], flat[1::2], strict=True))


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, meshes: Sequence[Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.meshes = meshes
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """One exchange for all layers."""
        from torch.distributed import _functional_collectives as collectives

        flat = torch.cat([grad.reshape(-1) for grad in grads])
        for mesh in ctx.meshes:
            flat = collectives.wait_tensor(collectives.all_reduce(flat, "sum", mesh)) / mesh.size()
        parts = flat.split([grad.numel() for grad in grads])
        return (None, *(part.view(grad.shape).to(grad.dtype) for part, grad in zip(parts, grads, strict=True)))


def embedded(model: nn.Module, embed: nn.Module, ids: Sequence[int], inputs: dict[str, Any]) -> Tensor:
    """What `embed`, whose table may be in parts, makes of ids: seen in a forward of the model, which joins them."""
    if not any(hasattr(parameter, "placements") for parameter in embed.parameters()):
        found: Tensor = embed(torch.tensor(list(ids), device=device_of(embed)))
        return found
    seen: list[Tensor] = []
    hook = embed.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        model(**inputs)
    finally:
        hook.remove()
    return seen[0][0]
