"""Which attention modules of a decoder ask a cache for their keys and values, where transformers' attention interface
does not reach them.

As in `discover`, nothing is guessed from names: the model reads a few tokens with a cache that notes who writes to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ..families import CACHED, text_config
from ..model.devices import device_of
from ..model.sample_inputs import CACHES, reads_tokens
from ..model.signature import argument_names
from ..model.tensor_parallel import head_group
from .discover import expected_layers
from .patch import frozen_run
from .recording import AttentionCall, record


class NoAttentionError(NotImplementedError):
    """A model has no attention that asks a cache for its keys and values."""


class WindowError(NotImplementedError):
    """A window would hide a prefix that is concatenated with keys and values."""


class _Recording(DynamicCache):
    """A cache that notes the module that writes to each of its layers, and what that gets back."""

    def __init__(self, config: Any, running: list[nn.Module]) -> None:
        super().__init__(config=config)
        self.running, self.found = running, list[tuple[nn.Module, int, Tensor, Tensor]]()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        key, value = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.found.append((self.running[-1], layer_idx, key, value))
        return key, value


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[nn.Module]]:
    """A block in which the last of the yielded modules is the innermost one that runs."""
    running: list[nn.Module] = []
    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(lambda module, args: running.append(module)))
        hooks.append(module.register_forward_hook(lambda module, args, output: running.pop() and None))
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()


def cache_name(model: nn.Module) -> str | None:
    """What the forward of a model calls its cache; None: it takes none."""
    names = argument_names(model)
    return next((name for name in CACHES if name in names), None)


def record_cached(model: PreTrainedModel, input_ids: Tensor) -> list[AttentionCall]:
    """The attention calls of one forward over `input_ids` [B, T] that write to a cache; the model is left as it was."""
    names = {module: name for name, module in model.named_modules()}
    name = cache_name(model)
    if name is None or model.config.is_encoder_decoder or not reads_tokens(model):
        return []
    with frozen_run(model), _watched(model) as running:
        cache = _Recording(text_config(model), running)
        model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=True, **{name: cache})
    return [
        AttentionCall(module, names[module], key.shape[1], key, value, {}, cache_layer=layer)
        for module, layer, key, value in cache.found
    ]


def discover_cached(model: PreTrainedModel) -> list[AttentionCall]:
    """The self-attention layers of the text decoder, in order, as they ask the cache for keys and values.

    Raises:
        NoAttentionError: no layer.
        WindowError: a window hides the prefix of a layer.
        NotImplementedError: not every layer, or heads that several processes share.
    """
    model_class, config = type(model).__name__, text_config(model)
    problem = None
    try:
        calls = record_cached(model, torch.zeros(1, 1, dtype=torch.long, device=device_of(model)))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # it keeps something else than keys and values, in a cache of its own
        calls, problem = [], error
    if not calls:
        raise NoAttentionError(f"{model_class} asks no cache of transformers for keys and values") from problem
    expected, found = expected_layers(config), {call.module for call in calls}
    if len(found) != expected or len(calls) != expected:
        raise NotImplementedError(
            f"{model_class} has {expected} layers with attention, but {len(found)} modules write to its cache, "
            f"{len(calls)} times; a prefix must reach each layer once"
        )
    if head_group(model) is not None:
        raise NotImplementedError(
            f"{model_class} shares its heads out to several processes (tensor parallelism), which a prefix that is "
            "concatenated with keys and values does not know: run it in one process, or data-parallel"
        )
    windows = [name for name, value in vars(config).items() if _is_window(name, value)]
    if windows and config.model_type not in CACHED:
        raise WindowError(
            f"{model_class} has a window (config.{windows[0]}), which would hide a prefix that is concatenated with "
            "keys and values once the text is longer"
        )
    return calls


def _is_window(name: str, value: Any) -> bool:
    return ("window" in name or name == "attention_chunk_size") and isinstance(value, int) and value > 1


def record_again(model: PreTrainedModel, input_ids: Tensor, calls: Sequence[AttentionCall]) -> list[AttentionCall]:
    """The attention calls of the layers of `calls`, over other ids [B, T]."""
    return record(model, input_ids) if calls[0].cache_layer is None else record_cached(model, input_ids)
