"""What PEFT's prefix tuning makes transformers do. Concatenate, repeat the heads, mask, attend."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def visible(queries: int, keys: int, virtual: int) -> Tensor:
    """[T, P + S] bool: all of the prefix, and the sequence up to the query (the last query sees all of it).

    transformers builds this once a forward pass for all layers, so it is not part of what is timed.
    """
    return torch.ones(queries, virtual + keys, dtype=torch.bool).tril(virtual + keys - queries)


def concatenated_sdpa(
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, Hkv, S, D]
    value: Tensor,  # [B, Hkv, S, D]
    prefix_key: Tensor,  # [Hkv, P, D], or a bank [N, Hkv, P, D]
    prefix_value: Tensor,
    mask: Tensor,  # [T, P + S], from `visible`
    prefix_index: Tensor | None = None,  # [B]: which entry of the bank each row sees
) -> Tensor:
    """[B, H, T, D]."""
    batch, heads = query.shape[:2]
    if prefix_index is not None:
        prefix_key, prefix_value = prefix_key[prefix_index], prefix_value[prefix_index]
    keys = torch.cat([prefix_key.expand(batch, *key.shape[1:2], *prefix_key.shape[-2:]), key], 2)
    values = torch.cat([prefix_value.expand(batch, *value.shape[1:2], *prefix_value.shape[-2:]), value], 2)
    return scaled_dot_product_attention(query, repeat_heads(keys, heads), repeat_heads(values, heads), attn_mask=mask)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, Hkv, S, D] to [B, H, S, D], as transformers does wherever there is a mask."""
    batch, kv_heads, length, dim = x.shape
    if kv_heads == heads:
        return x
    x = x[:, :, None].expand(batch, kv_heads, heads // kv_heads, length, dim)
    return x.reshape(batch, heads, length, dim)
