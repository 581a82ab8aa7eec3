"""`soft_embedding`: one lookup in two tables, the frozen vocabulary and the virtual tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import gradients
from ..backends.checks import check_storage
from .checks import check_dense, check_derivatives, check_tensor, device_type_of, has_values, of_all_calls, wrong
from .reference import soft_embedding_reference
from .select import backend_name

_INTEGERS = (torch.int64, torch.int32)


def soft_embedding(input_ids: Tensor, weight: Tensor, virtual: Tensor) -> Tensor:
    """Looks up ids in the frozen table `weight` and, from V upwards, in `virtual`.

    An id below V reads `weight[id]`, an id from V to V + N - 1 reads `virtual[id - V]` (TensorRT-LLM's
    convention for prompt tables), so where a soft prompt stands is only a matter of ids.

    Args:
        input_ids: int64 or int32, any shape `[...]`; int64 if V + N is more than 2^31.
        weight: `[V, E]`, float32, bfloat16, float16 or float64; must not require a gradient.
        virtual: `[N, E]`, the dtype of `weight` or float32 (a master copy); gets a gradient.

    Returns:
        `[..., E]`, contiguous, in the dtype of `weight`. In the backward `virtual` alone gets a
        gradient, summed in float32 in the order of the ids: the same bits on every run.

    Raises:
        IndexError: an id outside `[0, V + N)`, with its value and place.
        ValueError, TypeError: shapes, dtypes or devices that do not fit, or a table that wants a gradient.
        NotImplementedError: under `torch.func.grad`, `vjp` and `jvp`, which the reference can.

    Examples:
        >>> table = torch.zeros(100, 32)  # frozen: V = 100
        >>> prompt = torch.ones(2, 32, requires_grad=True)
        >>> ids = torch.tensor([[100, 101, 7, 8]])  # the prompt, then two tokens of text
        >>> embedded = prefixcore.soft_embedding(ids, table, prompt)
        >>> embedded[0, :, 0].tolist()
        [1.0, 1.0, 0.0, 0.0]
    """
    check_tensor("input_ids", input_ids)
    check_tensor("weight", weight)
    check_tensor("virtual", virtual)
    dtype, virtual_dtype, ids_dtype = weight.dtype, virtual.dtype, input_ids.dtype
    if ids_dtype not in _INTEGERS:
        raise wrong(TypeError, "input_ids", "int64 or int32", ids_dtype, "convert it with .long()")
    try:
        if weight.dim() != 2 or not dtype.is_floating_point:
            got = f"{list(weight.shape)} of {dtype}"
            raise wrong(ValueError, "weight", "a table [V, E] in a floating-point dtype", got)
        if virtual.dim() != 2 or virtual.shape[1] != weight.shape[1]:
            raise wrong(ValueError, "virtual", f"[N, E] with E = {weight.shape[1]} as in weight", list(virtual.shape))
    except RuntimeError:
        check_dense(weight=weight, virtual=virtual)
        raise
    if virtual_dtype != dtype and virtual_dtype != torch.float32:
        raise wrong(TypeError, "virtual", f"{dtype} as weight, or float32", virtual_dtype)
    device = weight.device
    if input_ids.device != device or virtual.device != device:
        devices = [str(x.device) for x in (input_ids, weight, virtual)]
        raise wrong(ValueError, "input_ids, weight and virtual", "one device", devices)
    if ids_dtype is not _INTEGERS[0] and weight.shape[0] + virtual.shape[0] > 2**31:
        rows = weight.shape[0] + virtual.shape[0]
        raise wrong(TypeError, "input_ids", f"int64 to name {rows} rows", "torch.int32", "convert it with .long()")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight requires a gradient, but soft_embedding trains virtual tokens alone and never the table: "
            "freeze it with weight.requires_grad_(False), or pass weight.detach()"
        )
    if backend_name("soft_embedding", device_type_of(weight), dtype) != "reference":
        plain = check_derivatives("soft_embedding")
        op = gradients.soft_embedding if plain else torch.ops.prefixcore.soft_embedding
        try:
            return op(input_ids, weight, virtual)
        except RuntimeError:  # NotImplementedError is one
            check_dense(input_ids=input_ids, weight=weight, virtual=virtual)
            raise
    if not torch.compiler.is_compiling():
        for name, x in (("input_ids", input_ids), ("weight", weight), ("virtual", virtual)):
            check_dense(**{name: x})
            check_storage(name, x)
    _check_range(input_ids, weight.shape[0] + virtual.shape[0], weight.shape[0])
    return soft_embedding_reference(input_ids, weight, virtual)


def _check_range(input_ids: Tensor, limit: int, vocabulary: int) -> None:
    """Raises the IndexError that the kernels raise themselves."""
    if not has_values(input_ids) or input_ids.numel() == 0:
        return
    input_ids = of_all_calls(input_ids)
    bad = ((input_ids < 0) | (input_ids >= limit)).nonzero()
    if len(bad):
        place = tuple(bad[0].tolist())
        raise IndexError(
            f"input_ids{list(place)} is {int(input_ids[place])}, expected 0 <= id < {limit} "
            f"({vocabulary} vocabulary rows and {limit - vocabulary} virtual tokens)"
        )
