"""Keys moved on by some positions, as a model's rotary embedding turns them.

A prefix knows of two conventions. In PEFT's, and ours, the text behind it begins at position P; in that of the adapters
library (`position_offset=False`) at position 0, where it would without a prefix. Scores depend on the distance of a
key from a query alone where keys are turned by their position, so moving all keys by P leads from one to the other,
exactly. With learned positions it does not: the text's own embeddings would change. Where attention counts distances
itself (ALiBi), no position is in a key, and it stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters import AdapterError
from ..attention.discover import expected_layers
from ..attention.prefix import KeyValue
from ..families import ROTARY, family_of, text_config
from ..model.devices import without_values
from ..model.sample_inputs import reads_tokens
from ..model.sharded import data_meshes
from ..model.tensor_parallel import head_group
from .frequencies import tables_of
from .key_turn import KeyTurn, halves
from .rotary_probe import probed_turns

_MOVING = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies change with the length of the text, and so the keys of all tokens."""

_Found = tuple[KeyTurn, ...] | str
"""How the keys of each layer turn; or, in words, why they cannot be turned."""

_found: WeakKeyDictionary[PreTrainedModel, tuple[torch.dtype, list[Tensor], _Found]] = WeakKeyDictionary()
"""What a probe found out, with the dtype and the tables of frequencies that it holds for."""


def turn(
    model: PreTrainedModel, pairs: Sequence[KeyValue], by: int | Tensor, layers: Sequence[int] | None = None
) -> list[KeyValue]:
    """Prefixes whose keys stand `by` positions further on, computed in float64; values stay.

    Keys in float64 stay so, all others become float32. Layers may turn in ways of their own (Gemma 3's local and global
    ones, SmolLM3's that do not turn), so it has to be known of which they are.

    Args:
        model: whose keys they are.
        pairs: the keys [Hkv, P, D] and values.
        by: how far all of them go, or each of the P tokens [P].
        layers: of each pair the number of its attention layer; None: they are of all layers, in order.

    Raises:
        AdapterError: the model does not turn keys by a fixed angle a position (learned positions, frequencies that
            change with the length of the text), or keys are not as wide as the layer's.
        ValueError: other layers than pairs.
    """
    turns = _turns(model)
    if isinstance(turns, str):
        raise AdapterError(turns)
    numbers = range(len(turns)) if layers is None else layers
    if len(numbers) != len(pairs):
        raise ValueError(
            f"layers: expected the layer of each of {len(pairs)} pairs, got {len(numbers)}"
            + (" (all layers of the model)" if layers is None else "")
        )
    places = torch.as_tensor(by)
    moved = []
    for number, (key, value) in zip(numbers, pairs, strict=True):
        if key.shape[-1] != turns[number].width:
            raise AdapterError(
                f"the keys of layer {number} have {key.shape[-1]} numbers, but those of {type(model).__name__} have "
                f"{turns[number].width}"
            )
        turned = turns[number](key, places)
        moved.append((turned if key.dtype == torch.float64 else turned.float(), value))
    return moved


def why_fixed(model: PreTrainedModel) -> str | None:
    """Why keys of `model` cannot be moved to other positions, in words; None: they can.

    The model reads a few tokens at several positions, once: a family's name says nothing here.
    """
    turns = _turns(model)
    return turns if isinstance(turns, str) else None


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


def _turns(model: PreTrainedModel) -> _Found:
    """How the keys of each layer turn, or why they cannot be turned."""
    if why := _why_without_probe(model):
        return why
    if why := _why_no_probe(model):
        return _by_family(model, why)
    tables = tables_of(model)
    known = _found.get(model)
    if known is None or known[0] != model.dtype or not _equal(known[1], tables):
        known = _found[model] = (model.dtype, tables, _probed(model))
    return known[2]


def _probed(model: PreTrainedModel) -> _Found:
    try:
        return probed_turns(model)
    except NotImplementedError as error:
        return str(error)


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def _why_without_probe(model: PreTrainedModel) -> str | None:
    """Why keys cannot be moved, where that is known without running the model; None: it is not."""
    family, name = family_of(model), type(model).__name__
    if model.config.is_encoder_decoder:
        return f"{name} is an encoder-decoder: only keys of a decoder alone can be moved to other positions"
    if not reads_tokens(model):
        return f"{name} reads {model.main_input_name}: only keys of text can be moved to other positions"
    if family is not None and family.positions != ROTARY:
        return (
            f"{name} has learned positions: keys cannot be moved to other positions, as those of the text behind them "
            "would change too"
        )
    if moving := has_moving_positions(model):
        # A few tokens are all turned by the table of short texts. Past its length, queries are turned by another one,
        # and keys by the first no longer stand at a distance that both agree on.
        return f"{name} has rotary embeddings of the kind {moving!r}, which turn by the length of the text"
    return None


def _why_no_probe(model: PreTrainedModel) -> str | None:
    """Why a few tokens cannot be read by this process alone; None: they can."""
    if head_group(model) is not None:
        return "shares its heads out to several processes (tensor parallelism)"
    if data_meshes(model):
        return "has its weights in parts, in several processes (FSDP)"
    if without_values(model):
        return "has weights without values (on the meta device)"
    return None


def _by_family(model: PreTrainedModel, why: str) -> _Found:
    """What a family is known for: one table, by which all of a key turns in halves, in every layer."""
    family, name = family_of(model), type(model).__name__
    found = [module for key, module in model.named_modules() if key.rpartition(".")[2] == "rotary_emb"]
    tables = [each.detach().cpu() for module in found if isinstance(each := getattr(module, "inv_freq", None), Tensor)]
    if family is None or not tables or any(not torch.equal(table, tables[0]) for table in tables):
        return (
            f"{name} {why}, so that it cannot be seen how its keys turn with their position: keys cannot be moved to "
            "other positions; load it in one process"
        )
    return (halves(2 * len(tables[0]), tables[0]),) * expected_layers(text_config(model))
