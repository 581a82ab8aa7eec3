"""Encoders that multiply embeddings of ids, and not those that they are given (`scale_embedding` of Marian, Pegasus).

PEFT gives embeddings, so with a soft prompt of its the text of such a model is some twenty times too small.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_SCALE_ALL = {"fsmt"}
"""Types of models whose encoder multiplies the embeddings that it is given, too, so PEFT's soft prompts are right."""


def scales_ids(stack: nn.Module) -> bool:
    """Whether a stack of layers multiplies the embeddings of ids alone. Of BART and others the table itself does it."""
    return getattr(stack, "embed_scale", 1.0) != 1.0


def reads_scaled_ids(model: nn.Module) -> bool:
    """Whether the encoder of an encoder-decoder that reads text multiplies the embeddings of ids alone."""
    whole: Any = model
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or getattr(config, "model_type", None) in _SCALE_ALL:
        return False
    return getattr(model, "main_input_name", None) == "input_ids" and scales_ids(whole.get_encoder())
