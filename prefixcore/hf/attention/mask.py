"""The mask function that transformers calls while attention is ours.

Masks speak about the sequence only: the prefix is seen by every query. Where the structure is causal or a sliding
window, it goes to the attention function by itself (`module.is_causal`, the `sliding_window` argument), and what is
left is at most a padding mask [B, S]. Where every token sees every other, what is left is a padding mask [B, 1, 1, S],
whose four dimensions say that this is all. Anything else (static caches, packed rows without `cu_seq_lens`, custom mask
functions, chunks) becomes the boolean mask of four dimensions that transformers builds for SDPA.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

from .disabled import other_attention
from .interface import ATTENTION


def prefix_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **kwargs: Any,
) -> Any:
    """None, a padding mask [B, S] (True is visible), or a mask [B, 1, T or 1, S] that says everything.

    Args:
        batch_size, q_length, kv_length: B, T, S.
        q_offset, kv_offset: position of the first query and of the first key.
        attention_mask: padding mask [B, >= S] of the whole sequence.
        local_size: window or chunk size, where the structure has one.
        allow_is_causal_skip: False: transformers has put more into `mask_function` than causality and a window.
        config: the model's.
        kwargs: what transformers' own `sdpa_mask` needs besides.

    Where what is attached is disabled: whatever mask the attention of the bare model takes.

    Raises:
        ValueError: the padding mask is shorter than the sequence.
    """
    other = other_attention(config)
    if other is not None:
        if other not in ALL_MASK_ATTENTION_FUNCTIONS:  # as transformers: an attention without masks
            return None
        return ALL_MASK_ATTENTION_FUNCTIONS[other](
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            config=config,
            **({} if local_size is None else {"local_size": local_size}),
            **kwargs,
        )
    if _sees_all(kwargs) and attention_mask is not None:
        return _padding_of(attention_mask, kv_length, kv_offset)
    structural = allow_is_causal_skip and _is_bottom_right(q_length, kv_length, q_offset, kv_offset)
    if not structural or not _is_known_structure(local_size, config):
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            local_size=local_size,
            # None would mean causal and aligned bottom-right to our attention function.
            allow_is_causal_skip=False,
            config=config,
            **kwargs,
        )
    if attention_mask is None:
        return None
    if attention_mask.shape[1] < kv_offset + kv_length:
        raise ValueError(
            f"attention_mask: expected a padding mask of all {kv_offset + kv_length} tokens, those in the cache "
            f"included, got {list(attention_mask.shape)}"
        )
    padding = attention_mask[:, kv_offset : kv_offset + kv_length]
    # Values are read once a forward, as transformers' own masks do. Compiled code cannot, and keeps the mask.
    if not is_tracing(padding) and bool(padding.all()):
        return None
    return padding


def _sees_all(arguments: dict[str, Any]) -> bool:
    """Whether every token sees every other: nothing was put into the mask, nor is it joined to another later."""
    same = arguments.get("mask_function") is bidirectional_mask_function
    return same and bool(arguments.get("allow_is_bidirectional_skip", False))


def _padding_of(attention_mask: Tensor, kv_length: int, kv_offset: int) -> Tensor | None:
    """The padding mask [B, 1, 1, S] of keys that all tokens see; None: there is no padding."""
    padding = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if not is_tracing(padding) and bool(padding.all()):
        return None
    return padding[:, None, None, :]


def _is_bottom_right(q_length: int, kv_length: int, q_offset: Any, kv_offset: int) -> bool:
    """Whether the last query stands at the last key, as the op assumes.

    Not in a static cache, which has unused keys after it and tells its length as a tensor.
    """
    return isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length


def _is_known_structure(local_size: int | None, config: Any) -> bool:
    """Whether the structure is causal, with or without a sliding window.

    Chunked attention has a `local_size` too, but nothing tells the attention function of chunks.
    """
    if local_size is None:
        return True
    return getattr(config, "attention_chunk_size", None) is None and local_size == getattr(
        config, "sliding_window", None
    )


AttentionMaskInterface.register(ATTENTION, prefix_mask)
