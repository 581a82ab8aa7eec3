"""The worker's side: reads prefixes, keeps some, and writes them into the blocks of requests.

What is in memory is written with the step that asks for it. What is not is read by a thread of its own, while the model
goes on with other requests, and written with a later step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..adapters import AdapterError
from ..adapters.header import AdapterHeader
from ..adapters.reading import read
from ..nn import LayerShape
from .admission import Load, Step
from .engine import CachePlace
from .host_cache import HostCache, HostPrefix

logger = logging.getLogger("vllm.prefixcore")


class CacheLayer(Protocol):
    """One layer's part of a paged cache, as one worker holds it."""

    shape: LayerShape
    """Of this worker's heads."""
    place: CachePlace

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Write `key` [N, Hkv, D] and `value` [N, Hkv, Dv] into the N `slots`."""


class StateLayer(Protocol):
    """The states of a layer without keys and values, one a block."""

    place: CachePlace

    def clear(self, block: int) -> None:
        """Puts the state of a block to where a text begins."""


def read_prefix(folder: Path, digest: str, layers: int, heads: slice, dtype: torch.dtype) -> HostPrefix:
    """The prefix of an adapter's folder as one worker writes it.

    Args:
        folder: the adapter's.
        digest: the content that it must have.
        layers: how many the model has.
        heads: those that this worker holds.
        dtype: the model's.

    Raises:
        AdapterError: it is damaged, no prefix for every layer, or has another content.
    """

    def fits(header: AdapterHeader) -> None:
        at_zero = not getattr(header.config, "position_offset", True)
        if header.config.method != "prefix" or at_zero or header.layers != list(range(layers)):
            raise AdapterError(f"{folder}: not a prefix for each of {layers} layers with the text from position P on")

    adapter = read(folder, fits=fits, state=False)
    if adapter.digest != digest:
        raise AdapterError(f"{folder}: expected the digest {digest}, got {adapter.digest}: it was replaced or altered")
    assert not isinstance(adapter.tensors, Tensor)

    def local(tensor: Tensor) -> Tensor:
        return tensor[heads].transpose(0, 1).to(dtype).contiguous()

    return HostPrefix([(local(key), local(value)) for key, value in adapter.tensors])


class Loader:
    """Writes prefixes into a worker's cache.

    Args:
        layers: the model's layers with keys and values, in their order.
        heads: those of a prefix that this worker holds.
        dtype: the model's.
        limit: bytes of prefixes that are kept in memory.
        states: the model's layers with a state.
    """

    def __init__(
        self,
        layers: Sequence[CacheLayer],
        heads: slice,
        dtype: torch.dtype,
        limit: int,
        states: Sequence[StateLayer] = (),
    ) -> None:
        self.layers, self.heads, self.states = layers, heads, states
        self.dtype = dtype
        self.kept = HostCache(limit)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="prefixcore")
        self._reading: dict[str, Future[HostPrefix]] = {}
        self._waiting: list[Load] = []
        self._loaded: set[str] = set()
        self._failed: set[str] = set()
        self._leaked: set[int] = set()

    def step(self, step: Step) -> None:
        """Does what a step asks for, and what earlier ones are waiting for, as far as it can be done now."""
        self._failed.update(step.refused)
        self._leaked.update(step.leaked)
        waiting = [*self._waiting, *step.loads]
        self._waiting = [load for load in waiting if not self._attempt(load)]
        wanted = {load.adapter.digest for load in self._waiting}
        self._reading = {digest: future for digest, future in self._reading.items() if digest in wanted}

    def take_results(self) -> tuple[set[str], set[str]]:
        """The requests whose prefix is in place, and those that cannot have theirs, since the last call."""
        loaded, self._loaded = self._loaded, set()
        failed, self._failed = self._failed, set()
        return loaded, failed

    def take_leaked(self) -> set[int]:
        """Blocks that were computed without their prefix."""
        leaked, self._leaked = self._leaked, set()
        return leaked

    def close(self) -> None:
        """Ends the thread; what is being read is read to its end."""
        self._reader.shutdown(cancel_futures=True)

    def _attempt(self, load: Load) -> bool:
        """Whether a load is over, done or failed; else it is being read."""
        try:
            prefix = self.kept.get(load.adapter.digest) or self._read(load)
            if prefix is None:
                return False
            self._write(load, prefix)
            self._loaded.add(load.request_id)
        except AdapterError as error:
            self._fail(load, str(error))
        except Exception as error:  # whatever it is, it is this request's alone: raised here it would end the server
            logger.exception("prefixcore: request %s", load.request_id)
            self._fail(load, f"{type(error).__name__}: {error}")
        return True

    def _fail(self, load: Load, reason: str) -> None:
        logger.error("prefixcore: request %s for the adapter %r fails: %s", load.request_id, load.adapter.name, reason)
        self._failed.add(load.request_id)

    def _read(self, load: Load) -> HostPrefix | None:
        """The prefix that the thread has read, or None while it is reading."""
        future = self._reading.get(load.adapter.digest)
        if future is None:
            future = self._reading[load.adapter.digest] = self._reader.submit(self._timed, load)
        if not future.done():
            return None
        prefix = future.result()
        self.kept.put(load.adapter.digest, prefix)
        return prefix

    def _timed(self, load: Load) -> HostPrefix:
        start = time.perf_counter()
        folder = load.adapter.folder
        prefix = read_prefix(folder, load.adapter.digest, len(self.layers), self.heads, self.dtype)
        for number, ((key, value), layer) in enumerate(zip(prefix.pairs, self.layers, strict=True)):
            found = LayerShape(key.shape[1], key.shape[2], value.shape[2])
            if found != layer.shape or key.shape[0] != load.stop:
                raise AdapterError(
                    f"{folder}: layer {number}: expected {load.stop} tokens of {layer.shape}, got {key.shape[0]} of "
                    f"{found}"
                )
        took = 1e3 * (time.perf_counter() - start)
        logger.info("prefixcore: read %s: %d bytes in %.0f ms", load.adapter.name, prefix.num_bytes, took)
        return prefix

    def _write(self, load: Load, prefix: HostPrefix) -> None:
        block_sizes = {layer.place.group: layer.place.block_size for layer in self.layers}
        slots = {group: _slots(load, group, block_size) for group, block_size in block_sizes.items()}
        for (key, value), layer in zip(prefix.pairs, self.layers, strict=True):
            layer.write(key[load.start : load.stop], value[load.start : load.stop], slots[layer.place.group])
        for state in self.states:
            # vLLM goes on from the state after `stop` tokens. A prefix is none of the text that a state has read.
            state.clear(load.blocks[state.place.group][(load.stop - 1) // state.place.block_size])


def _slots(load: Load, group: int, block_size: int) -> Tensor:
    """Where the tokens of a load lie in the caches of a group."""
    positions = torch.arange(load.start, load.stop)
    return torch.tensor(load.blocks[group])[positions // block_size] * block_size + positions % block_size
