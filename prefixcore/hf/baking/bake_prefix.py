"""What `bake` may make a prefix of, and the prefix it makes: keys and values that the frozen model computes once.

A decoder is causal, so what its layers compute for tokens in front does not depend on the text behind them. That holds
as long as every later token sees those in front, and as their keys do not change with what follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters import AdapterError
from ..attention.discover import is_encoder
from ..attention.discover_cached import record_again
from ..attention.patch import frozen_run
from ..attention.prefix import KeyValue
from ..attention.recording import AttentionCall
from ..bank.bank import Bank
from ..bank.prefix_calls import compute_once
from ..bank.reach import reach
from ..families import text_config
from ..handle import Handle
from ..model.own_words import own_words
from ..positions.position_table import position_limit
from ..positions.rotary import has_moving_positions
from ..reaching import find_attention_layers

_ATTENTION = {"full_attention", "sliding_attention"}


def check_can_be_exact(model: PreTrainedModel, calls: Sequence[AttentionCall]) -> None:
    """Raises NotImplementedError unless tokens in front of a text act as their keys and values do, whatever follows."""
    config, name = text_config(model), type(model).__name__
    if is_encoder(model, calls):
        raise NotImplementedError(
            f"{name} is an encoder: the text changes what stands before it, so no keys and values hold for every text; "
            "serve the soft prompt or the text itself, or train a prefix (PrefixTuningConfig)"
        )
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION)
    if others:
        raise NotImplementedError(
            f"{name} has layers of {', '.join(others)}, which keys and values in attention do not reach: train a "
            "prefix (PrefixTuningConfig), or serve the soft prompt or the text itself"
        )
    windows = _windows(config, calls)
    longest = getattr(config, "max_position_embeddings", None)
    if windows and (longest is None or min(windows) < longest):
        raise NotImplementedError(
            f"{name} has a sliding window of {min(windows)} tokens ({len(windows)} of {len(calls)} layers): they lose "
            "sight of a soft prompt or a text once so many tokens have followed it, and never of a prefix, so the two "
            "are not equal on longer texts; train a prefix (PrefixTuningConfig), or serve the soft prompt itself"
        )
    moving = has_moving_positions(model)
    if moving:
        raise NotImplementedError(
            f"{name} has rotary embeddings of the kind {moving!r}, whose frequencies depend on how long the text "
            "is, so that no keys hold for every text; train a prefix (PrefixTuningConfig), or serve the soft prompt "
            "itself"
        )


def _windows(config: Any, calls: Sequence[AttentionCall]) -> list[int]:
    """The window of each layer that has one, as the layer is told it, or as it has it in a buffer (GPT-Neo)."""
    if calls[0].cache_layer is not None:
        return [config.window_size for kind in getattr(config, "attention_layers", ()) if kind == "local"]
    return [window for call in calls if (window := call.kwargs.get("sliding_window")) is not None]


def prompt_to_prefix(
    model: PreTrainedModel, decoder: PreTrainedModel, calls: Sequence[AttentionCall], prompt: Tensor
) -> list[KeyValue]:
    """One (key [Hkv, P, D], value [Hkv, P, Dv]) for each layer, fp32: those of a soft prompt [P, E] before any text."""
    check_room(model, len(prompt))
    with own_words(model, "a prefix made of a soft prompt"), frozen_run(model):
        bank = Bank(model)
        try:
            bank.set_decoder(decoder, calls)
            reach(bank)
            pairs = compute_once(bank, prompt)
        finally:
            bank.patch.undo()
    return [(pair[0].float(), pair[1].float()) for pair in pairs if pair is not None]


def attached_to_prefix(handle: Handle, prompt: Tensor) -> list[KeyValue]:
    """The same on the model that the soft prompt is attached to, through what attaches it."""
    model, bank = handle.model, handle._bank
    check_room(model, len(prompt))
    reach(bank)
    with own_words(model, "a prefix made of a soft prompt"), frozen_run(model):
        pairs = compute_once(bank, prompt)
    return [(pair[0].float(), pair[1].float()) for pair in pairs if pair is not None]


def ids_to_prefix(
    model: PreTrainedModel, ids: Sequence[int], found: Sequence[AttentionCall] | None = None
) -> list[KeyValue]:
    """The same of a text, given as the ids of its tokens; `found`: the model's attention layers, if they are known."""
    found = find_attention_layers(model)[0] if found is None else found
    check_room(model, len(ids))
    with own_words(model, "a prefix made of a text"):
        calls = record_again(model, torch.tensor([list(ids)], device=model.device), found)
    return [(call.key[0].float(), call.value[0].float()) for call in calls]


def check_room(model: PreTrainedModel, count: int) -> None:
    """Raises AdapterError if so many virtual tokens leave no position for a text."""
    limit = position_limit(model)
    if limit is not None and count >= limit:
        raise AdapterError(f"{count} virtual tokens leave no room: the model has learned {limit} positions")
    longest = getattr(text_config(model), "max_position_embeddings", None)
    if isinstance(longest, int) and count >= longest:
        raise AdapterError(f"{count} virtual tokens leave no room: the model was made for {longest} positions")


def encode_text(tokenizer: Any, text: str, bos: bool | None, vocabulary: int) -> list[int]:
    """The ids of a text that is to stand before every input.

    Args:
        tokenizer: a transformers tokenizer.
        text: the text.
        bos: whether it begins with the token that begins every text; None: where the tokenizer has none, no.
        vocabulary: how many ids the model has.

    Raises:
        AdapterError: the tokenizer begins texts with a token of its own and nobody said where it goes; it ends them
            with one; a text without tokens, or with ids that the model does not have.
    """
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    full = list(tokenizer(text)["input_ids"])
    if not plain:
        raise AdapterError(f"text: expected one with tokens in it, got {text[:40]!r}")
    start = tokenizer.bos_token_id
    begins = full != plain and full[:1] == [start]
    if begins and bos is None:
        raise AdapterError(
            f"this tokenizer begins every text with {tokenizer.bos_token!r}: say whether it goes to the baked text "
            "(bos=True, --bos: requests must then come without one, add_special_tokens=False) or stays with each "
            "request (bos=False, --no-bos: the model then reads the text before it)"
        )
    if bos and start is None:
        raise AdapterError("bos: this tokenizer has no token that begins a text; leave it out")
    ids = [start, *plain] if bos else plain
    if max(ids) >= vocabulary:
        raise AdapterError(
            f"text: the tokenizer makes the id {max(ids)}, but the model's vocabulary has {vocabulary}: it is another "
            "model's tokenizer"
        )
    return ids
