"""The weights of a base model as they are found: their names without wrappers, and numbers of them in whatever form.

Quantised weights, tensors that are sharded over processes and weights that accelerate keeps on the CPU or the disk are
read where they lie. Nothing here talks to another process, so one rank alone may read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ATTACHED = "prefixcore"
"""The name under which `attach` registers what is trained."""

_WRAPPERS = {
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "base_layer",  # PEFT's layers
    "original_module",  # PEFT's modules_to_save
}
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


class Unreadable(Exception):
    """A weight's numbers cannot be read here; the message says why."""


@dataclass(frozen=True)
class Weight:
    """One weight of a base model.

    Attributes:
        name: its name in the bare model.
        tensor: the parameter.
        module: the module that holds it.
        field: its name there.
    """

    name: str
    tensor: Tensor
    module: nn.Module
    field: str

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the numbers which it stands for: not of a packed form, not of a shard."""
        state = getattr(self.tensor, "quant_state", None)  # bitsandbytes, 4 bit
        return tuple(getattr(self.tensor, "ds_shape", None) or getattr(state, "shape", None) or self.tensor.shape)


def base_weights(model: nn.Module, leave_out: Collection[str] = ()) -> Iterator[Weight]:
    """The weights of the bare model: without what is attached, PEFT's adapters, and modules that an adapter brings.

    Args:
        model: the model, also with PEFT's layers inside.
        leave_out: names of modules, matched as PEFT matches `modules_to_save`: the end of the name.
    """
    adapted = {name for name, module in model.named_modules() if "base_layer" in module._modules}
    seen: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=True):
        parts = path.split(".") if path else []
        if parts[:1] == [ATTACHED] or "modules_to_save" in parts or _is_adapter(parts, adapted):
            continue
        name = ".".join(part for part in parts if part not in _WRAPPERS)
        if any(is_named(name, wanted) for wanted in leave_out):
            continue
        for field, tensor in module._parameters.items():
            if tensor is None or id(tensor) in seen or (path in adapted and field not in ("weight", "bias")):
                continue
            seen.add(id(tensor))
            bare = f"{name}.{field}" if name else field
            yield Weight(bare.replace(".parametrizations.", "."), tensor, module, field)


def is_named(name: str, wanted: str) -> bool:
    """Whether a module's name ends with `wanted`, or it lies inside one whose name does."""
    return wanted != "" and any(f"{name}.".startswith(wanted + ".", at) for at in range(len(name)))


def _is_adapter(parts: Sequence[str], adapted: Collection[str]) -> bool:
    """Whether a module lies in one of PEFT's layers beside the layer that is adapted."""
    paths = (".".join(parts[:end]) for end in range(len(parts)))
    return any(path in adapted and parts[end] != "base_layer" for end, path in enumerate(paths))


def numbers_at(weight: Weight, indices: Sequence[int]) -> tuple[str, dict[int, float]]:
    """Some numbers of a weight, by their index in the flattened whole.

    Args:
        weight: the weight.
        indices: which; of a sharded weight, those of other processes are left out.

    Returns:
        The form that they were read from ("bfloat16", "int8", ...; "quantized": made from fewer bits), and the numbers.

    Raises:
        Unreadable: none can be read.
    """
    tensor = weight.tensor.detach()
    try:
        if is_sharded(tensor):
            return _of_shard(tensor, indices)
        if is_partitioned(weight.tensor):
            return _of_partition(weight.tensor, indices)
        tensor = materialized(weight)
        form, tensor = _dequantized(tensor, weight)
        taken = tensor.reshape(-1)[torch.tensor(indices, device=tensor.device)].double().cpu().tolist()
    except Unreadable:
        raise
    except Exception as error:  # a tensor subclass raises whatever its author thought of
        raise Unreadable(f"{type(tensor).__name__} cannot be read ({type(error).__name__})") from error
    return form, dict(zip(indices, taken, strict=True))


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a `DTensor` of which this process may hold a part."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def is_partitioned(tensor: Tensor) -> bool:
    """Whether it is a parameter whose numbers DeepSpeed's ZeRO-3 has taken away, a part to each process."""
    return getattr(tensor, "ds_shape", None) is not None and tensor.numel() == 0


def is_quantized(weight: Weight) -> bool:
    """Whether its numbers must be made from a form with fewer bits."""
    tensor = weight.tensor
    return any(hasattr(tensor, name) for name in ("quant_state", "SCB", "dequantize")) and (
        type(tensor) not in _PLAIN and not is_sharded(tensor)
    )


def is_repacked(weight: Weight) -> bool:
    """Whether a forward on a CPU has laid bitsandbytes' 4 bits out anew, with scales that it rounds to 16 bits."""
    return bool(getattr(getattr(weight.tensor, "quant_state", None), "packing_format_for_cpu", False))


def materialized(weight: Weight) -> Tensor:
    """The weight itself, or what accelerate's hook would put in its place for a forward.

    Raises:
        Unreadable: it has no data.
    """
    if is_partitioned(weight.tensor):
        raise Unreadable("partitioned by DeepSpeed")
    tensor = weight.tensor.detach()
    if not tensor.is_meta:
        return tensor
    kept = offloaded(weight.module, weight.field)
    if kept is None:
        raise Unreadable("on the meta device")
    return kept


def offloaded(module: nn.Module, field: str) -> Tensor | None:
    """The data of a module's parameter that accelerate keeps on the CPU or the disk; None: it keeps none."""
    hook: Any = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "offload", False) and getattr(each, "weights_map", None) is not None:
            try:
                kept = each.weights_map[field]
            except KeyError:
                continue
            return kept if isinstance(kept, Tensor) else torch.as_tensor(kept)
    return None


def _dequantized(tensor: Tensor, weight: Weight) -> tuple[str, Tensor]:
    """The form's name and a plain tensor of the whole weight."""
    if getattr(weight.tensor, "quant_state", None) is not None:
        return "quantized", _from_4bit(weight.tensor)
    scale = getattr(weight.tensor, "SCB", None)
    if scale is None:
        scale = getattr(getattr(weight.module, "state", None), "SCB", None)
    if tensor.dtype == torch.int8 and scale is not None:  # bitsandbytes, 8 bit: the largest of a row is 127
        return "quantized", tensor.float() * scale.to(tensor.device).float().unsqueeze(-1) / 127
    if type(tensor) not in _PLAIN and hasattr(tensor, "dequantize"):
        with_numbers = _plain_dequantized(tensor)
        if with_numbers is not None:
            return "quantized", with_numbers
    return str(tensor.dtype).removeprefix("torch."), tensor


def _from_4bit(tensor: Any) -> Tensor:
    """The numbers of bitsandbytes' 4 bits."""
    from bitsandbytes import functional

    return functional.dequantize_4bit(*laid_out_as_loaded(tensor))


def laid_out_as_loaded(tensor: Any) -> tuple[Tensor, Any]:
    """bitsandbytes' 4 bits and their state, as before a forward on a CPU laid them out anew (`is_repacked`)."""
    from bitsandbytes import functional

    packed, state = tensor.data, copy.copy(tensor.quant_state)  # the inverse writes into the state
    if getattr(state, "packing_format_for_cpu", False):
        packed, state = functional._convert_weight_packed_for_cpu_inverse(packed, state)
        if not state.nested:  # those scales the inverse leaves in the kernel's order
            state.absmax = state.absmax.T.reshape(-1).float()
    return packed, state


def _plain_dequantized(tensor: Tensor) -> Tensor | None:
    """What a tensor subclass that holds quantised numbers makes of them; None: it holds none."""
    try:
        made: Any = tensor.dequantize()
    except (RuntimeError, TypeError, NotImplementedError):  # Tensor.dequantize, of what is not quantised
        return None
    return made if type(made) in _PLAIN else None


def _of_shard(tensor: Any, indices: Sequence[int]) -> tuple[str, dict[int, float]]:
    """Those numbers that lie in the shard of this process: without a word to the others, who may not be listening."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not all(isinstance(placement, (Shard, Replicate)) for placement in tensor.placements):
        raise Unreadable(f"sharded as {list(tensor.placements)}")
    size, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor.to_local()
    found = {}
    for index in indices:
        place = [int(each) for each in _unravel(index, tuple(tensor.shape))]
        inside = [p - o for p, o in zip(place, offset, strict=True)]
        if all(0 <= p < s for p, s in zip(inside, size, strict=True)):
            found[index] = float(local[tuple(inside)])
    return str(tensor.dtype).removeprefix("torch."), found


def _of_partition(parameter: Any, indices: Sequence[int]) -> tuple[str, dict[int, float]]:
    """Those numbers that lie in the part which ZeRO-3 has left this process: a piece of the flattened whole."""
    part, group = parameter.ds_tensor, parameter.ds_process_group
    size = -(-math.prod(parameter.ds_shape) // torch.distributed.get_world_size(group))  # the last part is filled up
    if part.dtype != parameter.dtype or part.numel() != size:  # quantised, on a disk, or in the parts of another group
        raise Unreadable("partitioned by DeepSpeed")
    first = torch.distributed.get_rank(group) * size
    found = {index: float(part[index - first]) for index in indices if first <= index < first + size}
    return str(parameter.dtype).removeprefix("torch."), found


def _unravel(index: int, shape: tuple[int, ...]) -> list[int]:
    place: list[int] = []
    for size in reversed(shape):
        index, rest = divmod(index, size)
        place.insert(0, rest)
    return place
