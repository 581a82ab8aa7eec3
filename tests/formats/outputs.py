"""What a model computes with an adapter, and what it computes with plain tensors in transformers' own way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import prefixcore


def with_adapter(model: Any, folder: Path, ids: Tensor) -> Tensor:
    with prefixcore.load(model, folder), torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def behind_keys(model: Any, pairs: list[tuple[Tensor, Tensor]], ids: Tensor) -> Tensor:
    """Keys and values as an ordinary cache, the text at the positions behind them."""
    cache = DynamicCache(config=model.config)
    for layer, (key, value) in enumerate(pairs):
        rows = len(ids)
        cache.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), layer)
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache).logits


def behind_embeddings(model: Any, prompt: Tensor, ids: Tensor) -> Tensor:
    """Embeddings in front of those of the text."""
    text = model.get_input_embeddings()(ids)
    with torch.no_grad():
        both = torch.cat((prompt.expand(len(ids), -1, -1).to(text), text), 1)
        return model(inputs_embeds=both, use_cache=False).logits[:, len(prompt) :]
