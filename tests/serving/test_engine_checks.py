"""What the connector refuses before a server starts, and its settings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixcore.serving.engine import CachePlace, attention_places, check_engine, state_places
from prefixcore.serving.settings import Settings


class FullAttentionSpec(SimpleNamespace):
    """vLLM's own has this name."""


class SlidingWindowSpec(SimpleNamespace):
    """Of a model whose layers all have a window."""


class MambaSpec(SimpleNamespace):
    """Of layers with a state."""


class MLAAttentionSpec(SimpleNamespace):
    """Another kind."""


def configurations(**changes: Any) -> tuple[Any, Any]:
    """vLLM's configuration and that of its cache, as far as they are looked at."""
    fields = {"policy": "fail", "pipeline": 1, "context": 1, "kind": "llama", "window": None, "longest": 512}
    fields |= changes
    spec = FullAttentionSpec(sliding_window=fields["window"], attention_chunk_size=None)
    specs = fields.get("specs", [spec])
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy=fields["policy"]),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=fields["pipeline"], decode_context_parallel_size=fields["context"]
        ),
        model_config=SimpleNamespace(
            max_model_len=fields["longest"], hf_config=SimpleNamespace(model_type=fields["kind"])
        ),
    )
    return config, cache(*((each, []) for each in specs))


def cache(*groups: tuple[Any, list[str]]) -> Any:
    """vLLM's configuration of a cache: what each group keeps, and the names of its layers."""
    return SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec, layer_names=names) for spec, names in groups]
    )


def full(block_size: int = 16, window: int | None = None) -> Any:
    return FullAttentionSpec(sliding_window=window, attention_chunk_size=None, block_size=block_size)


def test_a_plain_decoder_is_served(tmp_path: Path) -> None:
    check_engine(*configurations(), Settings(tmp_path))
    check_engine(*configurations(window=512), Settings(tmp_path))
    check_engine(*configurations(specs=[full(), SlidingWindowSpec(sliding_window=512)]), Settings(tmp_path))
    check_engine(*configurations(specs=[SlidingWindowSpec(sliding_window=4096)]), Settings(tmp_path))
    check_engine(*configurations(specs=[MambaSpec(), full(), MambaSpec()]), Settings(tmp_path))
    check_engine(*configurations(kind="unheard-of"), Settings(tmp_path, unverified_models=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "recompute"}, "kv_load_failure_policy has to be 'fail'"),
        ({"pipeline": 2}, "pipeline_parallel_size above 1"),
        ({"context": 2}, "decode_context_parallel_size above 1"),
        ({"specs": [MambaSpec()]}, "expected a model with layers of attention.*got MambaSpec"),
        ({"specs": [full(), MLAAttentionSpec()]}, "got FullAttentionSpec, MLAAttentionSpec"),
        ({"specs": [full(), SlidingWindowSpec(sliding_window=128)]}, "--max-model-len 128 at most"),
        ({"specs": [SlidingWindowSpec(sliding_window=256)]}, "window of 256 tokens.*--disable-sliding-window"),
        ({"specs": []}, "got none"),
        ({"window": 128}, "--max-model-len 128 at most"),
        ({"kind": "unheard-of"}, "have not been compared with transformers"),
    ],
)
def test_what_a_prefix_cannot_be_served_with(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((NotImplementedError, ValueError), match=message):
        check_engine(*configurations(**changes), Settings(tmp_path))


def test_where_layers_keep_what_they_have() -> None:
    """In the order of the layers, whatever that of the groups is; a draft model's are none of the model's."""
    drafted = ["model.layers.2.self_attn.attn", "model.layers.12.self_attn.attn"]
    places = cache(
        (MambaSpec(block_size=512), ["model.layers.0.mamba", "model.layers.3.mamba"]),
        (full(32), drafted),
        (full(64), ["model.layers.1.self_attn.attn", "model.layers.10.self_attn.attn"]),
    )
    assert [(place.layer, place.group, place.block_size) for place in attention_places(places, 12)] == [
        ("model.layers.1.self_attn.attn", 2, 64),
        ("model.layers.2.self_attn.attn", 1, 32),
        ("model.layers.10.self_attn.attn", 2, 64),
    ]
    assert state_places(places) == [CachePlace(f"model.layers.{layer}.mamba", 0, 512) for layer in (0, 3)]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "adapters: expected a folder of adapters, got None"),
        ({"adapters": "/nowhere/at/all"}, "expected a folder of adapters, got '/nowhere/at/all'"),
        ({"adapters": ".", "cache": 1}, "cache: unknown; expected adapters, placeholder"),
        ({"adapters": ".", "placeholder": -1}, "placeholder: expected an integer from 0, got -1"),
        ({"adapters": ".", "host_cache_bytes": True}, "host_cache_bytes: expected an integer from 0, got True"),
        ({"adapters": ".", "unverified_models": "yes"}, "unverified_models: expected true or false"),
    ],
)
def test_settings(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.parse(extra)
