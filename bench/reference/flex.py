"""FlexAttention over concatenated keys: "see the prefix, or look back". On the CPU it has no backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


@cache
def compiled() -> Callable[..., Any]:
    """One compiled FlexAttention for all shapes; it compiles anew for each."""
    return torch.compile(flex_attention, dynamic=False)


def make_flex(
    queries: int, virtual: int, device: torch.device | str = "cpu"
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The attention for T = S = `queries` and P = `virtual`; its block mask is built here, once."""
    torch._dynamo.reset()  # an earlier shape's code would only count towards the limit of recompilations

    def looks_back(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i + virtual

    mask = create_block_mask(looks_back, None, None, queries, virtual + queries, device=device)
    attend = compiled()

    def flex(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> Tensor:
        """[B, H, T, D] from [B, H, T, D], two [B, Hkv, T, D] and two [Hkv, P, D]; without a gradient."""
        batch = query.shape[0]
        keys = torch.cat([prefix_key.expand(batch, *prefix_key.shape), key], 2)
        values = torch.cat([prefix_value.expand(batch, *prefix_value.shape), value], 2)
        return attend(query, keys, values, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1])

    return flex
