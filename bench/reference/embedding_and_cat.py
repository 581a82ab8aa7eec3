"""A soft prompt as PEFT puts it before the text: look up, expand, concatenate."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding


def embedding_and_cat(input_ids: Tensor, weight: Tensor, virtual: Tensor) -> Tensor:
    """[B, P + T, E] from ids [B, T], a frozen table [V, E] and a prompt [P, E]."""
    prompt = virtual.to(weight.dtype).expand(input_ids.shape[0], *virtual.shape)
    return torch.cat([prompt, embedding(input_ids, weight)], 1)
