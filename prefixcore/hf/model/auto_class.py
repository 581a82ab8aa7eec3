"""By which of transformers' auto classes a language model is opened."""

from __future__ import annotations

from typing import Any


def auto_class(config: Any) -> Any:
    """`AutoModelForCausalLM`; for what reads images, too, and has no class there, `AutoModelForImageTextToText`.

    Args:
        config: of the whole model.

    Examples:
        >>> from transformers import LlamaConfig, Qwen3VLConfig
        >>> from prefixcore.hf.model.auto_class import auto_class
        >>> [auto_class(config).__name__ for config in (LlamaConfig(), Qwen3VLConfig())]
        ['AutoModelForCausalLM', 'AutoModelForImageTextToText']
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    reads_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if reads_images and not is_causal else AutoModelForCausalLM
