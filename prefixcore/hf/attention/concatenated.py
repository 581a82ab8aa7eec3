"""The obvious implementation of a prefix inside of a model: concatenated with keys and values, in plain PyTorch.

What `prefixcore.hf.verify` holds an encoder to. It shares nothing with the op: the mask is the additive one that
transformers builds for its eager attention, and layers are told apart by the order of their calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from .prefix import KeyValue

CONCATENATED = "prefixcore_concatenated"

_pairs: ContextVar[Iterator[KeyValue | None]] = ContextVar("prefixcore_concatenated_pairs")


@contextmanager
def prefixes_in_order(pairs: Sequence[KeyValue | None]) -> Iterator[None]:
    """A block in which the first attention call sees the first of `pairs`, and so on; for one forward."""
    token = _pairs.set(iter(pairs))
    try:
        yield
    finally:
        _pairs.reset(token)


def concatenated_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention [B, T, H, Dv] over a prefix and the sequence; arguments as of an attention function of transformers."""
    pair = next(_pairs.get())
    heads, virtual = query.shape[1], 0
    if pair is not None:
        virtual = pair[0].shape[1]
        key, value = (
            torch.cat((prefix.to(x.dtype).expand(x.shape[0], -1, -1, -1), x), 2)
            for prefix, x in zip(pair, (key, value), strict=True)
        )
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))  # [B, H, P + S, D]
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + nn.functional.pad(position_bias, (virtual, 0))
    if attention_mask is not None:
        scores = scores + nn.functional.pad(attention_mask, (virtual, 0))  # [B, 1, T, P + S]
    weights = scores.float().softmax(-1).to(value.dtype)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register(CONCATENATED, concatenated_attention)
AttentionMaskInterface.register(CONCATENATED, eager_mask)
