"""How many bytes a forward pass keeps for the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(forward: Callable[[], Any], without: Iterable[Tensor] = ()) -> int:
    """Bytes of the memory blocks that autograd keeps while the result of `forward` is alive.

    A block counts once however many tensors look into it, and not at all if a tensor of `without` does: parameters
    and inputs are there anyway.
    """
    mine = {tensor.untyped_storage().data_ptr() for tensor in without}
    kept: list[Tensor] = []  # holding them keeps their addresses from being given out again

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.enable_grad():
        result = forward()
    blocks = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    del result
    return sum(size for address, size in blocks.items() if address not in mine)
