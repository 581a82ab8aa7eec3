"""What PEFT's prompt encoders hold: the virtual tokens of an adapter, once and not for every row of the batch.

The encoder stays PEFT's and owns the parameters, so gradients, optimizers and files are those that PEFT knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .methods import method


def flat_prefix(peft_model: Any, adapter: str) -> Tensor:
    """The prefix of an adapter, [P, layers * 2 * Hkv * D] in PEFT's layout, with its graph."""
    encoder, config = peft_model.prompt_encoder[adapter], peft_model.peft_config[adapter]
    if config.inference_mode or not getattr(encoder, "prefix_projection", False):
        return encoder.embedding.weight
    return encoder(_indices(encoder, config.num_virtual_tokens))


def prompt(peft_model: Any, adapter: str, task_ids: Tensor | None) -> Tensor:
    """The soft prompt of an adapter, with its graph: [P, E] for all rows, or [B, P, E] where rows name their task.

    On an encoder-decoder 2P rows, the encoder's and the decoder's (`num_transformer_submodules`).

    Raises:
        ValueError: MULTITASK_PROMPT_TUNING without `task_ids`, as in PEFT.
    """
    encoder: Any = peft_model.prompt_encoder[adapter]
    config = peft_model.peft_config[adapter]
    if method(peft_model) == "MULTITASK_PROMPT_TUNING":
        if task_ids is None:
            raise ValueError("task_ids cannot be None: the adapter has a soft prompt for each of its tasks")
        indices = _indices(encoder, _num_rows(config))
        return encoder(indices.expand(len(task_ids), -1), task_ids)
    if config.inference_mode or method(peft_model) == "PROMPT_TUNING":
        return encoder.embedding.weight
    indices = _indices(encoder, _num_rows(config))
    return encoder(indices[None])[0] if method(peft_model) == "P_TUNING" else encoder(indices)


def _num_rows(config: Any) -> int:
    return config.num_virtual_tokens * (config.num_transformer_submodules or 1)


def _indices(encoder: Any, num_virtual_tokens: int) -> Tensor:
    return torch.arange(num_virtual_tokens, device=encoder.embedding.weight.device)
