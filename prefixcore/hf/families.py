"""The model families that are known, and how each counts positions.

A family stands here when `tests/hf` compares it, prefix and soft prompt, with real PEFT or with the model reading
the same text. A model of another family is attached too, after it has passed the same comparison on the spot
(`prefixcore.hf.verify`).
"""

from __future__ import annotations

from typing import Any

ROTARY = "rotary"
LEARNED = "learned"

FAMILIES: dict[str, str] = {
    "llama": ROTARY,
    "mistral": ROTARY,
    "qwen2": ROTARY,
    "qwen3": ROTARY,
    "gemma2": ROTARY,
    "gpt_oss": ROTARY,
    "gpt2": LEARNED,
}
"""transformers' `model_type` of a text decoder -> kind of its positions."""


def text_config(model: Any) -> Any:
    """The configuration of the text decoder inside `model`."""
    return model.config.get_text_config(decoder=True)


def is_known(model: Any) -> bool:
    """Whether the text decoder of `model` is of a known family."""
    return text_config(model).model_type in FAMILIES


def known() -> str:
    """The known families, for messages."""
    return ", ".join(sorted(FAMILIES))


def position_limit(model: Any) -> int | None:
    """How many positions the model has a learned row for; None: positions are computed, without a limit."""
    config = text_config(model)
    return config.max_position_embeddings if FAMILIES.get(config.model_type) == LEARNED else None
