"""The tables of rotary frequencies that a model holds, wherever in it they are."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

_MOST = 1024
"""Numbers of a table: no head is wider than twice as many."""


def tables_of(model: PreTrainedModel) -> list[Tensor]:
    """The tables of frequencies in `model`, on the CPU, each once: what may be one, for a probe to tell.

    Frequencies are a buffer, or a tensor that a module keeps beside them; Gemma 3 has one for each kind of layer. GPT-J
    and CodeGen keep the sines and cosines of every position, whose second row has the frequencies for angles. Ernie 4.5
    VL has those of a picture's height before those of its width, and mixes the angles again: of text, a sorted table.
    """
    found: list[Tensor] = []
    for module in model.modules():
        kept = [value for value in vars(module).values() if isinstance(value, Tensor)]
        for tensor in (*module._buffers.values(), *kept):
            table = None if tensor is None or tensor.is_meta else _frequencies(tensor.detach())
            if table is not None and not any(torch.equal(table, each) for each in found):
                found.append(table)
    return found


def _frequencies(tensor: Tensor) -> Tensor | None:
    """The frequencies [n] of a tensor, float64; None: it has none."""
    if not tensor.is_floating_point():
        return None
    if tensor.dim() == 1 and 0 < len(tensor) <= _MOST:
        table = tensor.cpu().double()
        falling = table.sort(descending=True).values
        most, least = float(falling[0]), float(falling[-1])
        if torch.equal(table, falling):
            return table if least >= 0 and 0 < most <= torch.pi else None
        return falling if least > 0 and most == 1 else None  # 1: the first frequency of a table that nothing scales
    if tensor.dim() == 2 and len(tensor) > 1 and 0 < tensor.shape[1] <= 2 * _MOST and tensor.shape[1] % 2 == 0:
        rows = tensor[:2].cpu().double()
        sin, cos = rows.chunk(2, -1)
        if bool((sin[0] == 0).all()) and bool((cos[0] == 1).all()):
            found, usual = torch.atan2(sin[1], cos[1]), 10000.0 ** -(torch.arange(sin.shape[1]).double() / sin.shape[1])
            # In half precision an angle is rounded by more than positions far on allow.
            return usual if torch.allclose(found, usual, rtol=2 * torch.finfo(tensor.dtype).eps, atol=0) else found
    return None
