"""``soft_embedding``: one lookup in two tables, the frozen vocabulary and the virtual tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_derivatives, check_tensor, wrong
from .reference import soft_embedding_reference
from .select import backend_name


def soft_embedding(input_ids: Tensor, weight: Tensor, virtual: Tensor) -> Tensor:
    """Looks up ids in the frozen table ``weight`` and, from V upwards, in ``virtual``.

    An id below V reads ``weight[id]``, an id from V to V + N - 1 reads ``virtual[id - V]`` (TensorRT-LLM's
    convention for prompt tables), so where a soft prompt stands is only a matter of ids.

    Args:
        input_ids: int64 or int32, any shape ``[...]``.
        weight: ``[V, E]``, float32, bfloat16, float16 or float64; must not require a gradient.
        virtual: ``[N, E]``, the dtype of ``weight`` or float32 (a master copy); gets a gradient.

    Returns:
        ``[..., E]``, contiguous, in the dtype of ``weight``. In the backward ``virtual`` alone gets a
        gradient, summed in float32 in the order of the ids: the same bits on every run.

    Raises:
        IndexError: an id outside ``[0, V + N)``, with its value and place.
        ValueError, TypeError: shapes, dtypes or devices that do not fit, or a table that wants a gradient.
        NotImplementedError: under ``torch.func.grad``, ``vjp`` and ``jvp``, which the reference can.
    """
    for name, x in (("input_ids", input_ids), ("weight", weight), ("virtual", virtual)):
        check_tensor(name, x)
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise wrong(TypeError, "input_ids", "int64 or int32", input_ids.dtype, "convert it with .long()")
    if weight.dim() != 2 or not weight.dtype.is_floating_point:
        got = f"{list(weight.shape)} of {weight.dtype}"
        raise wrong(ValueError, "weight", "a table [V, E] in a floating-point dtype", got)
    if virtual.dim() != 2 or virtual.shape[1] != weight.shape[1]:
        raise wrong(ValueError, "virtual", f"[N, E] with E = {weight.shape[1]} as in weight", list(virtual.shape))
    if virtual.dtype != weight.dtype and virtual.dtype != torch.float32:
        raise wrong(TypeError, "virtual", f"{weight.dtype} as weight, or float32", virtual.dtype)
    if not weight.device == input_ids.device == virtual.device:
        devices = [str(x.device) for x in (input_ids, weight, virtual)]
        raise wrong(ValueError, "input_ids, weight and virtual", "one device", devices)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight requires a gradient, but soft_embedding trains virtual tokens alone and never the table: "
            "freeze it with weight.requires_grad_(False), or pass weight.detach()"
        )
    if backend_name("soft_embedding", weight.device.type, weight.dtype) != "reference":
        check_derivatives("soft_embedding")
        return torch.ops.prefixcore.soft_embedding(input_ids, weight, virtual)
    _check_range(input_ids, weight.shape[0] + virtual.shape[0], weight.shape[0])
    return soft_embedding_reference(input_ids, weight, virtual)


def _check_range(input_ids: Tensor, limit: int, vocabulary: int) -> None:
    """Raises the IndexError that the kernels raise themselves."""
    if torch.compiler.is_compiling() or input_ids.is_meta or input_ids.numel() == 0:
        return
    bad = ((input_ids < 0) | (input_ids >= limit)).nonzero()
    if len(bad):
        place = tuple(bad[0].tolist())
        raise IndexError(
            f"input_ids{list(place)} is {int(input_ids[place])}, expected 0 <= id < {limit} "
            f"({vocabulary} vocabulary rows and {limit - vocabulary} virtual tokens)"
        )
