"""What of vLLM's configuration the connector relies on, and what it refuses at the start.

Everything here reads attributes of vLLM's configuration and imports nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..nn import LayerShape
from .checkpoint import local_folder
from .families import why_unverified
from .model_config import WITHOUT_WINDOWS, lossy_window, num_attention_layers
from .settings import Settings

_ATTENTION = {"FullAttentionSpec", "SlidingWindowSpec"}
_STATE = "MambaSpec"
"""vLLM's names of what a group of layers keeps; the last is that of every layer with a state, of whatever kind."""


def check_engine(config: Any, kv_cache_config: Any, settings: Settings) -> None:
    """Raises unless prefixes can be served with vLLM's configuration.

    Args:
        config: `VllmConfig`.
        kv_cache_config: `KVCacheConfig`.
        settings: the connector's.

    Raises:
        NotImplementedError: the model or a parallelism is one that a prefix cannot be served with.
        ValueError: a setting that would make vLLM compute placeholders as real tokens.
    """
    parallel, model = config.parallel_config, config.model_config
    if config.kv_transfer_config.kv_load_failure_policy != "fail":
        raise ValueError(
            "prefixcore: kv_load_failure_policy has to be 'fail': with 'recompute' vLLM would compute the placeholders "
            "of a request whose prefix cannot be read as real tokens"
        )
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise NotImplementedError(f"prefixcore: {name} above 1 is not supported; use tensor_parallel_size")
    _check_layers(kv_cache_config, model.max_model_len)
    why = why_unverified(getattr(model.hf_config, "model_type", None))
    if why and not settings.unverified_models:
        raise NotImplementedError(
            f'prefixcore: {why}; set "unverified_models": true in kv_connector_extra_config, then run '
            "`prefixcore validate-serving`"
        )


def _check_layers(kv_cache_config: Any, max_model_len: int) -> None:
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    kinds = {type(spec).__name__ for spec in specs}
    attention = [spec for spec in specs if type(spec).__name__ in _ATTENTION]
    if not attention or kinds - _ATTENTION - {_STATE}:
        raise NotImplementedError(
            "prefixcore: expected a model with layers of attention, and none but those and layers with a state, got "
            f"{', '.join(sorted(kinds)) or 'none'}"
        )
    windows = [spec.sliding_window or getattr(spec, "attention_chunk_size", None) for spec in attention]
    shortest = min((window for window in windows if window is not None), default=max_model_len)
    if shortest >= max_model_len:
        return
    if kinds == {"SlidingWindowSpec"}:
        raise NotImplementedError(
            f"prefixcore: all layers of the model attend to {lossy_window(shortest)}; serve it with {WITHOUT_WINDOWS}"
        )
    raise NotImplementedError(
        f"prefixcore: the model attends to {lossy_window(shortest)}; serve it with --max-model-len {shortest} at most"
    )


@dataclass(frozen=True)
class CachePlace:
    """Where vLLM keeps what a layer has of a request.

    Attributes:
        layer: vLLM's name of the layer.
        group: which of its block tables the layer reads; those of a request hold other blocks in each group.
        block_size: tokens of a block.
    """

    layer: str
    group: int
    block_size: int


def attention_places(kv_cache_config: Any, num_hidden_layers: int) -> list[CachePlace]:
    """Those of keys and values, in the layers' order, without those of a draft model, which follow the model's."""
    places = {_number(place.layer): place for place in _places(kv_cache_config, _ATTENTION)}
    return [places[number] for number in sorted(places) if number < num_hidden_layers]


def state_places(kv_cache_config: Any) -> list[CachePlace]:
    """Those of the states of state spaces, linear attention and convolutions."""
    return _places(kv_cache_config, {_STATE})


def _places(kv_cache_config: Any, kinds: set[str]) -> list[CachePlace]:
    return [
        CachePlace(layer, number, group.kv_cache_spec.block_size)
        for number, group in enumerate(kv_cache_config.kv_cache_groups)
        if type(group.kv_cache_spec).__name__ in kinds
        for layer in group.layer_names
    ]


def _number(layer: str) -> int:
    """That of `model.layers.3.self_attn.attn`."""
    return next(int(part) for part in layer.split(".") if part.isdigit())


def model_layers(model: Any) -> list[LayerShape]:
    """The shape of the keys and values of each layer of vLLM's `ModelConfig` that has any, of the whole model."""
    shape = LayerShape(model.get_total_num_kv_heads(), model.get_head_size(), model.get_head_size())
    return [shape] * num_attention_layers(model.hf_text_config)


def checkpoint_folder(config: Any) -> Path | None:
    """Where the model's weights were loaded from; None: from nothing that can be compared with."""
    model, load = config.model_config, config.load_config
    if str(getattr(load.load_format, "value", load.load_format)) not in ("auto", "hf", "safetensors"):
        return None
    return local_folder(model.model, cache_dir=load.download_dir, revision=model.revision)
