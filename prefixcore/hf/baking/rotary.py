"""Keys moved on by some positions, as a model's rotary embedding turns them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters import AdapterError
from ..attention.prefix import KeyValue
from ..families import ROTARY, family_of, known_families
from .bake_prefix import has_moving_positions


def turn(model: PreTrainedModel, pairs: list[KeyValue], by: int | Tensor) -> list[KeyValue]:
    """Prefixes whose keys stand `by` positions further on, in float64 and back; values stay.

    Args:
        model: whose keys they are.
        pairs: the keys and values.
        by: how far all of them go, or each of the P tokens [P].

    Raises:
        AdapterError: the model does not turn keys by a fixed angle a position (learned positions, an unknown family,
            frequencies that change with the length of the text).
    """
    frequencies = _frequencies(model)
    angle = (by[:, None] if isinstance(by, Tensor) else by) * frequencies.double()
    return [(_turned(key, angle), value) for key, value in pairs]


def _turned(key: Tensor, angle: Tensor) -> Tensor:
    """Halves of the head are the two coordinates that turn; `angle` is [D/2], or [P, D/2] for keys [Hkv, P, D]."""
    half = angle.shape[-1]
    if key.shape[-1] != 2 * half:
        raise AdapterError(f"the rotary embedding turns {2 * half} numbers of a key, but heads have {key.shape[-1]}")
    first, second = key.double().split(half, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).float()


def _frequencies(model: PreTrainedModel) -> Tensor:
    """The angle of each pair of coordinates, for one position."""
    family, name = family_of(model), type(model).__name__
    if family is None or family.positions != ROTARY:
        why = "has learned positions" if family is not None else f"is not of a known family ({known_families()})"
        raise AdapterError(
            f"{name} {why}: keys cannot be moved to other positions, as those of the text behind them would change too"
        )
    if moving := has_moving_positions(model):
        raise AdapterError(f"{name} has rotary embeddings of the kind {moving!r}, which turn by the length of the text")
    found: list[Any] = [module for key, module in model.named_modules() if key.rpartition(".")[2] == "rotary_emb"]
    tables = [
        module.inv_freq.detach().cpu() for module in found if isinstance(getattr(module, "inv_freq", None), Tensor)
    ]
    if not tables or any(not torch.equal(table, tables[0]) for table in tables):
        raise AdapterError(f"{name} has {len(tables)} rotary embeddings, expected one for all layers")
    return tables[0]
