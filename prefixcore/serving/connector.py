"""The KV connector that vLLM loads: learned prefixes of a registry for the requests that name one.

    --kv-transfer-config '{"kv_connector": "PrefixConnector", "kv_role": "kv_consumer",
                           "kv_connector_module_path": "prefixcore.serving.connector",
                           "kv_connector_extra_config": {"adapters": "adapters/"}}'

vLLM makes two of it: one beside the scheduler (`Admission` decides), one in each worker (`Loader` reads and writes).
This module imports vLLM; of the others `metrics` and `offline` alone do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from ..nn import LayerShape
from .admission import Admission, Step
from .catalog import Catalog
from .engine import CachePlace, attention_places, check_engine, checkpoint_folder, model_layers, state_places
from .heads import local_heads
from .loading import Loader
from .metrics import UsageMetrics, UsageStats
from .served_model import ServedModel
from .settings import Settings


@dataclass
class PrefixMetadata(KVConnectorMetadata):
    """What goes from the scheduler to the workers with each step."""

    step: Step


class _AttentionCache:
    """One layer of vLLM's, whose backend alone knows how its cache is laid out."""

    def __init__(self, layer: Any, place: CachePlace) -> None:
        self.layer, self.place = layer, place
        self.shape = LayerShape(layer.num_kv_heads, layer.head_size, getattr(layer, "head_size_v", layer.head_size))

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        cache = self.layer.kv_cache
        key, value, slots = (tensor.to(cache.device, non_blocking=True) for tensor in (key, value, slots))
        self.layer.impl.do_kv_cache_update(self.layer, key, value, cache, slots)


class _StateCache:
    """One layer of vLLM's with states, such as a convolution's and a state space's, each a tensor [blocks, ...]."""

    def __init__(self, layer: Any, place: CachePlace) -> None:
        self.layer, self.place = layer, place

    def clear(self, block: int) -> None:
        for state in self.layer.kv_cache:
            state[block].zero_()


class PrefixConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's connector: see the module. The second base says that layers may keep blocks of several kinds."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._settings = Settings.parse(self._kv_transfer_config.kv_connector_extra_config)
        check_engine(vllm_config, kv_cache_config, self._settings)
        self._config = vllm_config
        self._loader: Loader | None = None
        self._admission: Admission | None = None
        if role == KVConnectorRole.SCHEDULER:
            model = vllm_config.model_config
            served = ServedModel.describe(model.hf_config, model_layers(model), checkpoint_folder(vllm_config))
            catalog = Catalog(self._settings.adapters, served, self._settings.baked)
            self._admission = Admission(catalog, self._settings.placeholder)

    # The scheduler's side.

    def on_new_request(self, request: Any) -> None:
        assert self._admission is not None
        self._admission.arrived(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._admission is not None
        external = self._admission.external_tokens(request, num_computed_tokens)
        return external, external > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._admission is not None
        self._admission.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        return ()  # blocks are zeroed as ever: a prefix fills its last one only in part

    def build_connector_meta(self, scheduler_output: Any) -> PrefixMetadata:
        assert self._admission is not None
        for new in scheduler_output.scheduled_new_reqs:
            self._admission.scheduled(new.req_id, new.num_computed_tokens)
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self._admission.scheduled(request_id, computed)
        return PrefixMetadata(self._admission.take_step())

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self._admission is not None
        self._admission.finished(request)
        return False, None

    def get_kv_connector_stats(self) -> UsageStats | None:
        usage = None if self._admission is None else self._admission.take_usage()
        return UsageStats(usage.to_dict()) if usage else None

    # Where metrics are kept.

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> UsageStats:
        return UsageStats(data or {})

    @classmethod
    def build_prom_metrics(cls, *arguments: Any) -> UsageMetrics:
        return UsageMetrics(*arguments)

    # The workers' side.

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        layers = self._config.compilation_config.static_forward_context
        parallel = self._config.parallel_config.tensor_parallel_size
        heads = self._config.model_config.get_total_num_kv_heads()
        self._loader = Loader(
            self._attention_layers(layers),
            local_heads(heads, parallel, get_tensor_model_parallel_rank() if parallel > 1 else 0),
            self._config.model_config.dtype,
            self._settings.host_cache_bytes,
            [_StateCache(layers[place.layer], place) for place in state_places(self._kv_cache_config)],
        )

    def _attention_layers(self, layers: Mapping[str, Any]) -> list[_AttentionCache]:
        model = self._config.model_config
        places = attention_places(self._kv_cache_config, model.hf_text_config.num_hidden_layers)
        wanted = len(model_layers(model))
        if len(places) != wanted:
            raise NotImplementedError(
                f"prefixcore: expected {wanted} layers with keys and values of their own, got {len(places)}: "
                f"{', '.join(place.layer for place in places)}"
            )
        for place in places:
            if not hasattr(layers[place.layer].impl, "do_kv_cache_update"):
                backend = type(layers[place.layer].impl).__name__
                raise NotImplementedError(
                    f"prefixcore: the attention backend {backend} writes its cache in another way"
                )
        return [_AttentionCache(layers[place.layer], place) for place in places]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, PrefixMetadata)
        if self._loader is not None:
            with torch.inference_mode():
                self._loader.step(metadata.step)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if self._loader is None:
            return KVConnectorTransferResults()
        loaded, failed = self._loader.take_results()
        return KVConnectorTransferResults(finished_recving=loaded | failed, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._loader.take_leaked() if self._loader is not None else set()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded while the model runs."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def shutdown(self) -> None:
        if self._loader is not None:
            self._loader.close()
