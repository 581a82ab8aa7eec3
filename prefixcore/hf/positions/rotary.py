"""Keys moved on by some positions, as a model's rotary embedding turns them.

A prefix knows of two conventions. In PEFT's, and ours, the text behind it begins at position P; in that of the adapters
library (`position_offset=False`) at position 0, where it would without a prefix. Scores depend on the distance of a
key from a query alone where keys are turned by their position, so moving all keys by P leads from one to the other,
exactly. With learned positions it does not: the text's own embeddings would change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters import AdapterError
from ..attention.prefix import KeyValue
from ..families import ROTARY, family_of, known_families, text_config

_MOVING = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies change with the length of the text, and so the keys of all tokens."""


def turn(model: PreTrainedModel, pairs: list[KeyValue], by: int | Tensor) -> list[KeyValue]:
    """Prefixes whose keys stand `by` positions further on, computed in float64; values stay.

    Keys in float64 stay so, all others become float32.

    Args:
        model: whose keys they are.
        pairs: the keys and values.
        by: how far all of them go, or each of the P tokens [P].

    Raises:
        AdapterError: the model does not turn keys by a fixed angle a position (learned positions, an unknown family,
            frequencies that change with the length of the text).
    """
    if why := why_fixed(model):
        raise AdapterError(why)
    angle = (by[:, None] if isinstance(by, Tensor) else by) * _frequencies(model).double()
    return [(_turned(key, angle.to(key.device)), value) for key, value in pairs]


def why_fixed(model: PreTrainedModel) -> str | None:
    """Why keys of `model` cannot be moved to other positions, in words; None: they can."""
    family, name = family_of(model), type(model).__name__
    if family is None or family.positions != ROTARY:
        why = "has learned positions" if family is not None else f"is not of a known family ({known_families()})"
        return (
            f"{name} {why}: keys cannot be moved to other positions, as those of the text behind them would change too"
        )
    if moving := has_moving_positions(model):
        return f"{name} has rotary embeddings of the kind {moving!r}, which turn by the length of the text"
    tables = _tables(model)
    if not tables or any(not torch.equal(table, tables[0]) for table in tables):
        return f"{name} has {len(tables)} rotary embeddings, expected one for all layers"
    return None


def has_moving_positions(model: PreTrainedModel) -> str | None:
    """The kind of rotary embedding whose frequencies change with the length of the text; None: there is none."""
    kinds = _rope_types(getattr(text_config(model), "rope_parameters", None))
    return next((kind for kind in sorted(kinds) if kind in _MOVING), None)


def _rope_types(parameters: Any) -> list[str]:
    """The kinds of rotary embedding that a configuration names, one or one for each kind of layer."""
    if not isinstance(parameters, dict):
        return []
    inner = [kind for each in parameters.values() for kind in _rope_types(each)]
    return [*inner, *([parameters["rope_type"]] if isinstance(parameters.get("rope_type"), str) else [])]


def _turned(key: Tensor, angle: Tensor) -> Tensor:
    """Halves of the head are the two coordinates that turn; `angle` is [D/2], or [P, D/2] for keys [Hkv, P, D]."""
    half = angle.shape[-1]
    if key.shape[-1] != 2 * half:
        raise AdapterError(f"the rotary embedding turns {2 * half} numbers of a key, but heads have {key.shape[-1]}")
    first, second = key.double().split(half, -1)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return turned if key.dtype == torch.float64 else turned.float()


def _frequencies(model: PreTrainedModel) -> Tensor:
    """The angle of each pair of coordinates, for one position."""
    return _tables(model)[0]


def _tables(model: PreTrainedModel) -> list[Tensor]:
    found: list[Any] = [module for key, module in model.named_modules() if key.rpartition(".")[2] == "rotary_emb"]
    return [module.inv_freq.detach().cpu() for module in found if isinstance(getattr(module, "inv_freq", None), Tensor)]
