"""What a model's configuration says of its heads and windows, under whatever name it has there."""

from __future__ import annotations

from typing import Any

from ..nn import LayerShape

WITHOUT_WINDOWS = "--disable-sliding-window"
"""vLLM's option to serve no more tokens than a window has, so that every layer sees all of them."""

_WINDOWED = {"sliding_attention", "chunked_attention"}


def read_config(name: str) -> Any:
    """The configuration of a transformers model.

    Args:
        name: a folder of the model, or its id.

    Raises:
        OSError, ValueError: transformers finds no such model.
    """
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name, trust_remote_code=False)


def num_attention_layers(config: Any) -> int:
    """How many layers have keys and values: all but state spaces, linear attention and convolutions.

    Args:
        config: of the text model.

    Examples:
        >>> from transformers import Qwen2Config, Qwen3_5TextConfig
        >>> from prefixcore.serving.model_config import num_attention_layers
        >>> [num_attention_layers(config(num_hidden_layers=8)) for config in (Qwen2Config, Qwen3_5TextConfig)]
        [8, 2]
    """
    from ..hf.attention.discover import expected_layers

    return expected_layers(config)


def layer_shapes(config: Any) -> list[LayerShape]:
    """The shape of the keys and values of each layer that has any.

    Args:
        config: of the text model.

    Examples:
        >>> from transformers import Qwen2Config
        >>> from prefixcore.serving.model_config import layer_shapes
        >>> layer_shapes(Qwen2Config(num_hidden_layers=1, num_key_value_heads=2, hidden_size=64, num_attention_heads=4))
        [LayerShape(num_kv_heads=2, key_dim=16, value_dim=16)]
    """
    count = num_attention_layers(config)
    differ = getattr(config, "is_heterogeneous", False)  # as those of Gemma 4, whose every third layer has larger heads
    return [_layer_shape(layer) for layer in (config.per_layer_config if differ else [config] * count)]


def _layer_shape(config: Any) -> LayerShape:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return LayerShape(num_kv_heads(config), size, size)


def num_kv_heads(config: Any) -> int:
    """The key/value heads of a layer, Hkv.

    Args:
        config: of the text model.

    Examples:
        >>> from transformers import FalconConfig
        >>> from prefixcore.serving.model_config import num_kv_heads
        >>> num_kv_heads(FalconConfig(num_attention_heads=71, multi_query=True))
        1
    """
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1  # Falcon before its new architecture, and GPT-BigCode
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return int(config.num_attention_heads)


def window(config: Any) -> tuple[int | None, bool]:
    """How many tokens a layer looks back at, and whether all layers do so; None: no layer has a window.

    Args:
        config: of the text model.

    Examples:
        >>> from transformers import Gemma2Config, MistralConfig, Qwen2Config
        >>> from prefixcore.serving.model_config import window
        >>> window(MistralConfig(sliding_window=4096)), window(Gemma2Config(sliding_window=4096)), window(Qwen2Config())
        ((4096, True), (4096, False), (None, False))
    """
    types = getattr(config, "layer_types", None)
    size = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if not size or (types and not _WINDOWED.intersection(types)):
        return None, False
    return int(size), not types or _WINDOWED.issuperset(types)


def lossy_window(size: int) -> str:
    """What a prefix cannot be served with, in words."""
    return f"a window of {size:,} tokens, which would lose the prefix"
