"""How the keys of each layer turn with their position, found by running the model and not by its name.

The model reads a few tokens at some positions and again further on. Attention of a rotary embedding knows of distances
alone, so that the keys of every layer are the same ones turned: a layout and a table of frequencies that make the one
of the other are proven, others are not. A model that takes no positions reads one token again and again, whose keys
then differ by their position alone, in every layer: attention on equal values is that value, whatever the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention.discover import discover, find_backbone, is_encoder
from ..attention.discover_cached import discover_cached, record_again
from ..attention.recording import AttentionCall
from ..families import is_known, text_config
from ..model.own_words import own_words
from ..model.signature import argument_names, as_keywords
from .frequencies import tables_of
from .key_turn import KeyTurn, every_turn
from .model_inputs import plain_ids
from .position_table import position_limit
from .positions import shift_positions

TOKENS, REPEATED = 6, 64
"""How many tokens are read at other positions; how often one is read where positions cannot be given."""

FARTHEST = 256
"""How much further on tokens stand at most than at 0, where a text begins and RecurrentGemma forgets what was."""

TOLERANCE, TOLERANCE_HALF = (1e-4, 5e-3), (1e-2, 0.1)
"""The share of a key by which it may be off, in the first layer and above.

SmolLM2-135M is off by 3e-7 and 6e-7 in float32, by 0.003 and 0.011 in bfloat16; TF32 takes a thousandth above the first
layer, where what is multiplied has moved. The next best table or layout is off by 0.4.
"""

UNMOVED = 1e-3, 0.05
"""The same of keys that do not turn, in any dtype: in the first layer what is multiplied is equal."""

CLEAR = 0.25
"""The share of the way that keys move by which they may be off, so that a small part that turns is seen as well."""


class Moved(NamedTuple):
    """Keys of one layer, and the same ones `by` positions further on: [Hkv, T, D]."""

    by: int
    before: Tensor
    after: Tensor


def probed_turns(model: PreTrainedModel) -> tuple[KeyTurn, ...]:
    """How the keys of each attention layer turn, in the order of `discover`.

    Raises:
        NotImplementedError: an encoder, or keys that do something else than turn.
    """
    with own_words(model, "keys that are moved to other positions"):
        calls, backbone = _layers(model)
        if is_encoder(model, calls):
            raise NotImplementedError(
                f"{type(model).__name__} is an encoder: keys cannot be moved to other positions, as the text changes "
                "what stands before it"
            )
        tables = tables_of(model)
        takes_positions = "position_ids" in argument_names(backbone)
        seen = _at_positions(model, backbone, calls) if takes_positions else _repeated(model, calls)
        turns = _all(model, seen, tables)
        if takes_positions and not any(len(turn.frequencies) for turn in turns):
            _check_heeds_none(model, calls)
    return turns


def _check_heeds_none(model: PreTrainedModel, calls: Sequence[AttentionCall]) -> None:
    """Raises NotImplementedError if a model that does not heed the positions it is given knows of others."""
    try:
        _all(model, _repeated(model, calls), [])
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{type(model).__name__} does not heed the positions that it is given and knows where a token stands in "
            "another way (by counting, or by layers that are no attention): keys cannot be moved to other positions"
        ) from error


def _layers(model: PreTrainedModel) -> tuple[list[AttentionCall], PreTrainedModel]:
    """The layers that a prefix reaches and their decoder, as `find_attention_layers` finds them, without its checks."""
    try:
        calls = discover(model)
        return calls, find_backbone(model, calls)
    except NotImplementedError as refusal:
        if is_known(model):
            raise
        try:
            calls = discover_cached(model)
            return calls, find_backbone(model, calls)
        except NotImplementedError:
            raise refusal from None


def _room(model: PreTrainedModel) -> int:
    """How many positions the model may be asked for."""
    longest = getattr(text_config(model), "max_position_embeddings", None)
    limits = [limit for limit in (position_limit(model), longest) if isinstance(limit, int) and limit > 0]
    return min(limits, default=FARTHEST + TOKENS)


def _at_positions(model: PreTrainedModel, backbone: Any, calls: Sequence[AttentionCall]) -> list[list[Moved]]:
    """What is seen of each layer where the same tokens stand at other positions."""
    ids = plain_ids(model, TOKENS)
    farthest = min(FARTHEST, _room(model) - TOKENS)
    if farthest < 1:
        raise NotImplementedError(f"{type(model).__name__} has no more than {_room(model)} positions")

    def keys(at: int) -> list[Tensor]:
        with _shifted(backbone, at):
            return [call.key[0].detach().cpu().double() for call in record_again(model, ids, calls)]

    before = keys(0)
    moved = [(by, keys(by)) for by in sorted({1, farthest})]
    return [[Moved(by, key, after[layer]) for by, after in moved] for layer, key in enumerate(before)]


@contextmanager
def _shifted(backbone: Any, by: int) -> Iterator[None]:
    """A block in which the tokens of `backbone` stand `by` positions further on."""
    names = argument_names(backbone)

    def shift(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = as_keywords(names, args, kwargs)
        shift_positions(kwargs, by, None)
        return (), kwargs

    hook = backbone.register_forward_pre_hook(shift, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _repeated(model: PreTrainedModel, calls: Sequence[AttentionCall]) -> list[list[Moved]]:
    """What is seen of each layer where one token stands at every position."""
    count = min(REPEATED, _room(model))
    ids = plain_ids(model, 1).expand(1, count).contiguous()
    found = [call.key[0].detach().cpu().double() for call in record_again(model, ids, calls)]
    return [[Moved(by, key[:, :1], key[:, by : by + 1]) for by in sorted({1, count - 1})] for key in found]


def _all(model: PreTrainedModel, seen: Sequence[Sequence[Moved]], tables: Sequence[Tensor]) -> tuple[KeyTurn, ...]:
    """The turn of each layer; NotImplementedError: a layer's keys do something else."""
    name = type(model).__name__
    exact = all(parameter.dtype in (torch.float32, torch.float64) for parameter in model.parameters())
    tolerance = TOLERANCE if exact else TOLERANCE_HALF
    turns = []
    for layer, moved in enumerate(seen):
        if not all(bool(each.after.isfinite().all()) and bool(each.before.any()) for each in moved):
            raise NotImplementedError(
                f"{name} has keys in layer {layer} that are all zero, or no numbers: it cannot be seen how they turn "
                "with their position"
            )
        turn, error = best_turn(moved, tables, tolerance[layer > 0])
        if turn is None or (not len(turn.frequencies) and error > UNMOVED[layer > 0]):
            if not tables and (limit := position_limit(model)) is not None:
                why = f"has positions in its embeddings (a table of {limit})"
            else:
                why = (
                    f"has keys in layer {layer} that turn with their position by none of its {len(tables)} tables of "
                    f"rotary frequencies (off by {error:.2g} of their length)"
                )
            raise NotImplementedError(
                f"{name} {why}: keys cannot be moved to other positions, as those of the text behind them would change "
                "too"
            )
        turns.append(turn)
    return tuple(turns)


def best_turn(moved: Sequence[Moved], tables: Sequence[Tensor], tolerance: float) -> tuple[KeyTurn | None, float]:
    """The turn that makes keys of keys, None if there is none, and by which share of them the nearest one is off."""
    options = every_turn(moved[0].before.shape[-1], tables)
    errors = [max(_error(turn(each.before, torch.tensor(each.by)), each.after) for each in moved) for turn in options]
    best = min(range(len(options)), key=errors.__getitem__)
    proven = errors[best] <= tolerance and (best == 0 or errors[best] <= CLEAR * errors[0])
    return options[best] if proven else None, errors[best]


def _error(found: Tensor, expected: Tensor) -> float:
    """By which share of it a key is off, the median of all heads and tokens: a router may send one elsewhere."""
    size = expected.norm(dim=-1).flatten()
    missing = (found - expected).norm(dim=-1).flatten()
    return float((missing[size > 0] / size[size > 0]).median())
