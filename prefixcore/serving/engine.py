"""What of vLLM's configuration the connector relies on, and what it refuses at the start.

Everything here reads attributes of vLLM's configuration and imports nothing of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..nn import LayerShape
from .checkpoint import local_folder
from .families import why_unverified
from .model_config import WITHOUT_WINDOWS, lossy_window
from .settings import Settings


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
    kinds = sorted({type(spec).__name__ for spec in specs})
    if len(specs) == 1 and kinds == ["SlidingWindowSpec"]:
        raise NotImplementedError(
            f"prefixcore: all layers of the model attend to {lossy_window(specs[0].sliding_window)}; serve it with "
            f"{WITHOUT_WINDOWS}"
        )
    if len(specs) != 1 or kinds != ["FullAttentionSpec"]:
        raise NotImplementedError(
            "prefixcore: expected a model whose layers all have one kind of full attention, got "
            f"{', '.join(kinds) or 'none'}"
        )
    window = specs[0].sliding_window or specs[0].attention_chunk_size
    if window is not None and window < max_model_len:
        raise NotImplementedError(
            f"prefixcore: the model attends to {lossy_window(window)}; serve it with --max-model-len {window} at most"
        )


def model_layers(model: Any) -> list[LayerShape]:
    """The shape of the keys and values of each layer of vLLM's `ModelConfig`, of the whole model."""
    shape = LayerShape(model.get_total_num_kv_heads(), model.get_head_size(), model.get_head_size())
    return [shape] * model.hf_text_config.num_hidden_layers


def checkpoint_folder(config: Any) -> Path | None:
    """Where the model's weights were loaded from; None: from nothing that can be compared with."""
    model, load = config.model_config, config.load_config
    if str(getattr(load.load_format, "value", load.load_format)) not in ("auto", "hf", "safetensors"):
        return None
    return local_folder(model.model, cache_dir=load.download_dir, revision=model.revision)
