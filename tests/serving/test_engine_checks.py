"""What the connector refuses before a server starts, and its settings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixcore.serving.engine import check_engine
from prefixcore.serving.settings import Settings


class FullAttentionSpec(SimpleNamespace):
    """vLLM's own has this name."""


class SlidingWindowSpec(SimpleNamespace):
    """Of a model whose layers all have a window."""


class MambaSpec(SimpleNamespace):
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
    return config, SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=each) for each in specs])


def test_a_plain_decoder_is_served(tmp_path: Path) -> None:
    check_engine(*configurations(), Settings(tmp_path))
    check_engine(*configurations(window=512), Settings(tmp_path))
    check_engine(*configurations(kind="unheard-of"), Settings(tmp_path, unverified_models=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "recompute"}, "kv_load_failure_policy has to be 'fail'"),
        ({"pipeline": 2}, "pipeline_parallel_size above 1"),
        ({"context": 2}, "decode_context_parallel_size above 1"),
        ({"specs": [MambaSpec()]}, "one kind of full attention, got MambaSpec"),
        ({"specs": [SlidingWindowSpec(sliding_window=4096)]}, "window of 4,096 tokens.*--disable-sliding-window"),
        ({"specs": []}, "one kind of full attention, got none"),
        ({"window": 128}, "--max-model-len 128 at most"),
        ({"kind": "unheard-of"}, "have not been compared with transformers"),
    ],
)
def test_what_a_prefix_cannot_be_served_with(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((NotImplementedError, ValueError), match=message):
        check_engine(*configurations(**changes), Settings(tmp_path))


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
