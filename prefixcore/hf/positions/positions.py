"""Positions: where the sequence stands when P virtual tokens come before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model.sample_inputs import model_input
from .cache import cache_argument, cache_length
from .model_inputs import restarts


def batch_rows(kwargs: dict[str, Any]) -> int:
    """B of a call, or how many sequences are packed in it."""
    if kwargs.get("cu_seq_lens_q") is not None:
        return len(kwargs["cu_seq_lens_q"]) - 1
    given = model_input(kwargs)
    return given.shape[0] if isinstance(given, Tensor) else 0


def query_length(kwargs: dict[str, Any]) -> int:
    """T of a call; ValueError: it has no tokens [B, T], nor embeddings of them."""
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        got = f", got {list(tokens.shape)}" if isinstance(tokens, Tensor) else ""
        raise ValueError(f"the model needs input_ids [B, T] or inputs_embeds [B, T, E]{got}")
    return tokens.shape[1]


def is_packed(kwargs: dict[str, Any]) -> bool:
    """Whether a call that starts sequences has several in a row: `cu_seq_lens_q` says so, or positions that restart."""
    if kwargs.get("cu_seq_lens_q") is not None:
        return True
    positions = kwargs.get("position_ids")
    is_start = kwargs.get("attention_mask") is None and cache_argument(kwargs) is None
    return isinstance(positions, Tensor) and is_start and not torch.compiler.is_compiling() and restarts(positions)


def past_length(kwargs: dict[str, Any]) -> int | Tensor:
    """How many tokens the cache of a call holds: an int, or a tensor [] if the cache is static."""
    cache = cache_argument(kwargs)
    return 0 if cache is None else cache_length(cache)


def shift_positions(kwargs: dict[str, Any], counts: int | Tensor, limit: int | None, first: int = 0) -> None:
    """Moves the positions of a call behind its prefix, in place; those that transformers would count are made explicit.

    They are counted from the mask where there is one, as `generate` does, so that padding on the left does not stand
    between a prefix and its text.

    Args:
        kwargs: the arguments of the call.
        counts: P; or a tensor [B, 1], packed [1, T], where rows have different prefixes.
        limit: how many positions the model has learned; None: it computes them.
        first: where the model places the first token of a text by itself: at 2 in RoBERTa.

    Raises:
        ValueError: the call needs more positions than `limit`.
    """
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    past, length = past_length(kwargs), query_length(kwargs)
    if positions is not None:
        kwargs["position_ids"] = positions + counts
    else:
        kwargs["position_ids"] = _count_positions(kwargs, past, length) + first + counts
        if first and isinstance(mask, Tensor) and mask.shape == (batch_rows(kwargs), length):
            # A model that counts from 2 gives padding the position before that, whichever side it is on.
            kwargs["position_ids"] = kwargs["position_ids"].masked_fill(mask == 0, first - 1)
    most = counts if isinstance(counts, int) else int(counts.max())
    if limit is not None and past + length + most > limit:
        # Padded batch rows are longer than their positions, so values decide. Reading them makes a GPU wait.
        check_limit(int(kwargs["position_ids"].max()) + 1 - first, most, limit)


def _count_positions(kwargs: dict[str, Any], past: int | Tensor, length: int) -> Tensor:
    """Positions [1, T] or [B, T] as transformers' `generate` gives them."""
    ids, mask = kwargs.get("input_ids"), _padding_mask(kwargs.get("attention_mask"))
    device = (ids if ids is not None else kwargs["inputs_embeds"]).device
    places = torch.arange(length, device=device) + past
    if mask is None:
        return places.unsqueeze(0)
    if isinstance(past, int) and past + length > mask.shape[1]:
        return places.unsqueeze(0)  # a mask that is too short is refused where masks are made
    visible = mask.to(device).bool().long()
    after_text = (visible.flip(1).cumsum(1).flip(1) == 0).long()  # padding on the right is counted on
    return (visible.cumsum(1) - 1 + after_text.cumsum(1)).clamp(min=0)[:, places]


def _padding_mask(mask: Any) -> Tensor | None:
    """The padding mask [B, S] that a decoder is given, itself or in the masks that were made of it; None: neither."""
    if isinstance(mask, dict):  # by kind of layer: Gemma 3 makes them before its decoder is called
        mask = mask.get("full_attention")
        if isinstance(mask, Tensor) and mask.dim() == 4:
            return mask[:, 0, -1]  # what the last query sees, which is all but padding
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def check_limit(needed: int, num_virtual_tokens: int, limit: int) -> None:
    """Raises ValueError if more positions are needed than the model has learned."""
    if needed > limit:
        fewer = ", or use fewer virtual tokens" if num_virtual_tokens else ""
        raise ValueError(
            f"the model has learned {limit} positions, but this input needs {needed}: {num_virtual_tokens} virtual "
            f"tokens and {needed - num_virtual_tokens} of its own; shorten the input to at most "
            f"{limit - num_virtual_tokens} tokens{fewer}"
        )
