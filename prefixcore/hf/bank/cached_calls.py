"""A call of a decoder whose attention nothing but its cache reaches: layers read one that begins with the prefix."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from ..attention.prefix import KeyValue, PrefixCall
from ..attention.prefixed_cache import PrefixedCache, WindowBuffer, extend_mask, num_virtual_tokens, reading
from ..families import CACHED, text_config
from ..model.sample_inputs import CACHES
from ..positions.cache import cache_argument
from ..positions.decoder_positions import moved
from ..positions.positions import batch_rows, check_limit, is_packed, past_length, query_length

if TYPE_CHECKING:
    from .bank import Bank


def reach_cached(bank: Bank) -> None:
    """What a family needs besides its cache: the prefix in a buffer that holds the windows of its layers."""
    family = CACHED.get(text_config(bank.model).model_type)
    if family is not None and family.window_buffer is not None:
        for layer in bank.layers:
            bank.patch.set_attribute(layer, family.window_buffer, WindowBuffer(layer, family.window_buffer))


def forward_cached(bank: Bank, forward: Callable[..., Any], kwargs: dict[str, Any], call: PrefixCall) -> Any:
    """A forward of the decoder behind the prefixes of `call`; what it returns holds the cache of the text alone.

    Raises:
        NotImplementedError: sequences are packed, or gradient checkpointing, which takes caches away, is on.
        ValueError: the model has too few positions.
    """
    decoder: Any = bank.decoder
    refuse_packed(kwargs)
    if not any(call.pairs):
        return forward(**kwargs)
    if decoder.training and bank.checkpoints:
        raise NotImplementedError(
            f"{type(decoder).__name__} gets its prefix through its cache, which gradient checkpointing takes away from "
            "its layers: turn it off"
        )
    rows, virtual, past = batch_rows(kwargs), num_virtual_tokens(call), past_length(kwargs)
    if bank.limit is not None and not bank.takes_positions and isinstance(past, int):
        check_limit(past + query_length(kwargs) + virtual, virtual, bank.limit)
    cache, keeps = cache_argument(kwargs), kwargs.get("use_cache")
    keeps = getattr(decoder.config, "use_cache", True) if keeps is None else keeps
    if cache is None:
        cache = DynamicCache(config=text_config(decoder))
    elif not isinstance(cache, Cache):
        raise ValueError(f"expected a cache of transformers (transformers.Cache), got {type(cache).__name__}")
    if cache.is_compileable and bank.patch.attributes:
        raise NotImplementedError(
            f"{type(decoder).__name__} cuts its windows out by how many keys there are, of which a static cache has "
            "more than tokens: take a dynamic one"
        )
    mask = kwargs.get("attention_mask")
    if mask is None and call.index is not None:
        mask = _mask_of_all(cache, rows, int(past), query_length(kwargs), call.index.device)
    mask, order = extend_mask(mask, call)
    kwargs["attention_mask"] = mask
    prefixed = PrefixedCache(cache, call, bank.cache_layers, order)
    for name in CACHES:
        kwargs.pop(name, None)
    with reading(prefixed), moved(_counts(bank, call, virtual)):
        output = forward(**kwargs, **{bank.cache_name: prefixed})
    if not prefixed.was_read:
        raise NotImplementedError(
            f"no attention of {type(decoder).__name__} read its cache in this call, so none saw the prefix (BigBird's "
            "sparse attention, of long texts, does not): shorten the text, or set config.attention_type to the full one"
        )
    return _without(output, prefixed, cache if keeps else None)


def _mask_of_all(cache: Cache, rows: int, past: int, query: int, device: torch.device) -> Tensor:
    """A mask [B, S] of rows that see all keys, and none of the room that a static cache has behind them."""
    length = past + query
    mask = torch.ones(rows, length, dtype=torch.long, device=device)
    room = cache.get_mask_sizes(query, 0)[0] - length if cache.is_compileable else 0
    return nn.functional.pad(mask, (0, room))


def _counts(bank: Bank, call: PrefixCall, virtual: int) -> list[int]:
    """By how much a decoder that counts positions moves those of each row: its cache has the longest prefix for all.

    Raises:
        NotImplementedError: prefixes of several lengths on a decoder whose positions nobody knows how to move.
    """
    if bank.takes_positions or call.index is None or text_config(bank.model).model_type in CACHED:
        return []  # biases by distance are those of the row by itself, as keys are masked and ordered
    assert call.lengths is not None
    index = call.index.cpu()
    lengths: list[int] = call.lengths[0].cpu()[index.clamp(min=0)].where(index >= 0, 0).tolist()
    if bank.positions is None and set(lengths) != {virtual}:
        raise NotImplementedError(
            f"{type(bank.decoder).__name__} counts positions from what its cache holds, which would be the longest "
            f"prefix of the batch for every row, and rows have prefixes of {sorted(set(lengths))} virtual tokens: put "
            "rows of one length into a batch"
        )
    return [length - virtual for length in lengths]


def refuse_packed(kwargs: dict[str, Any]) -> None:
    """Raises NotImplementedError where sequences are packed: nothing would keep one from seeing those before it."""
    if is_packed(kwargs):
        raise NotImplementedError(
            "the model has attention of its own, to which a prefix is concatenated, so sequences cannot be packed: pad "
            "them into rows of their own"
        )


def _without(output: Any, prefixed: PrefixedCache, cache: Cache | None) -> Any:
    """An output with the cache of the text in place of the prefixed one; None: with none."""
    if isinstance(output, tuple):
        kept = output if cache is not None else [each for each in output if each is not prefixed]
        return tuple(cache if each is prefixed else each for each in kept)
    return type(output)(**{name: cache if each is prefixed else each for name, each in output.items()})


def compute_once_cached(bank: Bank, forward: Callable[..., Any], prompt: Tensor) -> list[KeyValue]:
    """The keys and values that the layers compute for embeddings [P, E] at positions 0 to P-1."""
    cache = DynamicCache(config=text_config(bank.model))
    mask = torch.ones(1, len(prompt), dtype=torch.long, device=prompt.device)
    forward(inputs_embeds=prompt[None].clone(), attention_mask=mask, use_cache=True, **{bank.cache_name: cache})
    layers = {number: layer for layer, number in bank.cache_layers.items()}
    filled: list[Any] = [cache.layers[layers[number]] for number in range(len(layers))]
    return [(layer.keys[0], layer.values[0]) for layer in filled]
