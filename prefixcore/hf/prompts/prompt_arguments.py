"""The arguments of a call that soft prompts can be put into, and what they are given as."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from ..positions.cache import cache_argument, counts_tokens
from ..positions.model_inputs import (
    TOKEN_TYPES,
)
from ..positions.positions import check_limit

_PLACES = ("mc_token_ids", "cls_index")
"""Arguments that say which token of a row a head reads."""

_TOKEN_ARGUMENTS = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", *TOKEN_TYPES}
"""Arguments with a value a token for which the value at virtual tokens is known."""


def check_positions(kwargs: dict[str, Any], virtual: int, needed: int, limit: int | None) -> None:
    """Raises ValueError if a call with its prompt needs more positions than the model has learned."""
    if limit is not None and needed > limit:
        given = kwargs.get("position_ids")
        check_limit(needed if given is None else int(given.max()) + 1, virtual, limit)


def tokens(kwargs: dict[str, Any]) -> Tensor:
    """What the input of a call is given as: ids [B, T] or embeddings [B, T, E]."""
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    return cast(Tensor, embeds if ids is None else ids)


def check_arguments(kwargs: dict[str, Any], axes: bool) -> None:
    """Raises for arguments that soft prompts cannot be put into."""
    cache, mask, positions = cache_argument(kwargs), kwargs.get("attention_mask"), kwargs.get("position_ids")
    if cache is not None and cache.is_compileable and counts_tokens(cache):
        raise NotImplementedError(
            "a static cache has no room for the virtual tokens of a soft prompt: generate with a dynamic cache "
            "(leave cache_implementation out), or attach a prefix, which needs no room"
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise NotImplementedError(
            "a soft prompt needs attention_mask as a padding mask [B, T]: a mask made for the input alone says nothing "
            "about the virtual tokens"
        )
    if positions is not None and positions.dim() not in ((2, 3) if axes else (2,)):
        expected = "[B, T] or [axes, B, T]" if axes else "[B, T]"
        raise NotImplementedError(f"a soft prompt needs position_ids {expected}, got {list(positions.shape)}")
    if isinstance(kwargs.get("logits_to_keep"), Tensor) and kwargs.get("cu_seq_lens_q") is None:
        raise NotImplementedError(
            "a soft prompt needs logits_to_keep as a number of last tokens, got a tensor of token indices, which is "
            "for packed batches"
        )
    for name in _PLACES:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{name} counts tokens from the first one of a row, before which a soft prompt is put: leave it out, "
                "so that the head reads the token that it takes by itself, or attach a prefix (PrefixTuningConfig)"
            )
    packed = kwargs.get("cu_seq_lens_q") is not None
    given = kwargs.get("input_ids")
    given = kwargs.get("inputs_embeds") if given is None else given
    if isinstance(given, Tensor) and given.dim() < 2:
        raise ValueError(f"the model needs input_ids [B, T] or inputs_embeds [B, T, E], got {list(given.shape)}")
    if not isinstance(given, Tensor) or given.shape[1] < 2:  # [B, 1] is also the shape of what is not per token
        return
    for name, value in kwargs.items():
        if name in _TOKEN_ARGUMENTS or (packed and name == "seq_idx"):
            continue
        if isinstance(value, Tensor) and value.shape[:2] == given.shape[:2]:
            raise NotImplementedError(f"{name} has a value a token, and none is known for virtual tokens")
