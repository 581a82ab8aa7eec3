"""What each adapter was used for, among vLLM's metrics: at /metrics for Prometheus, and in a line of its log.

vLLM asks the connector beside its scheduler after each step, and hands what it says to where metrics are kept.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from .usage import Usage

_NAME = "vllm:prefixcore_"
"""vLLM takes metrics with its own name in front away when an engine is made anew in a process."""

_SECONDS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
"""As of vLLM's own `vllm:e2e_request_latency_seconds`."""


class UsageStats(KVConnectorStats):
    """A `Usage` as vLLM carries a connector's statistics."""

    def reset(self) -> None:
        self.data = Usage().to_dict()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        usage = Usage.from_dict(self.data)
        usage.merge(Usage.from_dict(other.data))
        self.data = usage.to_dict()
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(Usage.from_dict(self.data).summary())

    def is_empty(self) -> bool:
        return not Usage.from_dict(self.data)


class UsageMetrics(KVConnectorPromMetrics):
    """The metrics, with the label `adapter` beside vLLM's own."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

        def counter(name: str, what: str, *labels: str) -> Any:
            return self._counter_cls(_NAME + name, what, labelnames=[*self._labelnames, *labels])

        self._requests = counter("requests", "Requests of an adapter that have ended.", "adapter")
        self._failed = counter("failed_requests", "Those of them that ended with an error.", "adapter")
        self._prompt = counter("prompt_tokens", "Tokens of an adapter's prompts, without virtual tokens.", "adapter")
        self._generation = counter("generation_tokens", "Tokens of an adapter's answers.", "adapter")
        self._refused = counter("refused_requests", "Requests that named an adapter which they could not have.")
        self._seconds = self._histogram_cls(
            f"{_NAME}e2e_request_latency_seconds",
            "Seconds of an adapter's requests.",
            buckets=_SECONDS,
            labelnames=[*self._labelnames, "adapter"],
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        usage, labels = Usage.from_dict(transfer_stats_data), self.per_engine_labelvalues[engine_idx]
        for name, used in usage:
            self._requests.labels(*labels, name).inc(used.requests)
            self._failed.labels(*labels, name).inc(used.failed)
            self._prompt.labels(*labels, name).inc(used.prompt_tokens)
            self._generation.labels(*labels, name).inc(used.generation_tokens)
            for seconds in used.seconds:
                self._seconds.labels(*labels, name).observe(seconds)
        self._refused.labels(*labels).inc(usage.refused)
