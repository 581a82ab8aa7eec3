"""PyTorch's attention over the sequence alone, without any prefix. What a prefix can cost, measured from here."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def bare_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, H, T, D] from query [B, H, T, D] and key, value [B, Hkv, T, D]; causal; grouped heads not repeated."""
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])


def sees_all(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same where each query sees every key, as the one of a step of decoding does."""
    return scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] != key.shape[1])
