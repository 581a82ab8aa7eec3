"""Virtual tokens as ids behind the vocabulary, and what stands for them in a call of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...ops import soft_embedding
from ..attention.prefix import KeyValue, LayerPrefixes
from ..batch.tasks import Key, Task
from ..model.devices import device_of
from ..positions.model_inputs import stand_ins
from ..prompts.prompt_embeddings import is_plain_table


class VirtualIds:
    """The virtual tokens of several tasks, each an id from V upwards.

    The values are those of when it is made: pages that were filled before stay what they are.

    Args:
        embed: the input embeddings of the model, whose table has V rows.
        layers: the attention layers, by their place in the model.
        prompts: of each task that is a soft prompt its embeddings [P, E].
        prefixes: of each task that is a prefix its keys [Hkv, P, D] and values [Hkv, P, Dv] by layer.
        stand_in: the id that the model is given for a soft prompt's virtual token; None: it is given embeddings.

    Attributes:
        vocabulary: V.
        spans: of each task its first id, and P.
    """

    def __init__(
        self,
        embed: Any,
        layers: Sequence[nn.Module],
        prompts: dict[Task, Tensor],
        prefixes: dict[Task, LayerPrefixes],
        stand_in: int | None = None,
    ) -> None:
        self.stand_in = stand_in
        self.embed, self.vocabulary = embed, embed.weight.shape[0]
        self.spans: dict[Key, tuple[int, int]] = {}
        device = device_of(embed)
        lengths = {task: len(prompt) for task, prompt in prompts.items()}
        lengths |= {task: _length(prefix) for task, prefix in prefixes.items()}
        first = self.vocabulary
        for task, length in lengths.items():
            self.spans[task.key()] = first, length
            first += length
        rows = [prompts.get(task, torch.zeros(length, embed.weight.shape[1])) for task, length in lengths.items()]
        self.table = torch.cat([each.float().to(device) for each in rows]) if prompts else None
        kinds = [torch.full((length,), task in prefixes) for task, length in lengths.items()]
        self.is_prefix = torch.cat(kinds).to(device) if prefixes else None
        self.pairs: dict[Any, KeyValue] = {}
        for i, layer in enumerate(layers if prefixes else ()):
            self.pairs[getattr(layer, "layer_idx", None)] = _of_all(lengths, prefixes, i)

    def text(self, ids: Any) -> list[int]:
        """The ids of a text, of a list or an array of them, or of one row.

        Raises:
            ValueError: they are no ids of the vocabulary, none at all, or several rows.
        """
        shape: Any = getattr(ids, "shape", ())
        found = ids.reshape(-1).tolist() if len(shape) and shape[-1] == math.prod(shape) else list(ids)
        found = [i.item() if isinstance(i, np.integer) else i for i in found]
        for i in found:
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < self.vocabulary:
                raise ValueError(
                    f"a request: expected ids from 0 to {self.vocabulary - 1}, got {i!r}: give a list of ids, those of "
                    "the text alone"
                )
        if not found:  # behind a prefix there is no token that a next one could follow
            raise ValueError("a request: expected at least one id, got none")
        return found

    def before(self, task: Task | None, ids: Sequence[int]) -> WithVirtual:
        """The ids of a request: those of its virtual tokens, and those of its text."""
        first, length = (0, 0) if task is None else self.spans[task.key()]
        return WithVirtual([*range(first, first + length), *ids])

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the copy of the model, `forward`, with pages of keys and values."""
        ids: Tensor = kwargs["input_ids"]
        update = _update_of(kwargs["cache"], self)
        update.layers = set()
        is_virtual = ids >= self.vocabulary
        if ids.device.type == "cpu" and not bool(is_virtual.any()):  # reading it makes a GPU wait
            update.rows = None
            return self._checked(update, forward(*args, **kwargs))
        which = (ids - self.vocabulary).clamp(min=0).long()
        if self.is_prefix is not None:
            rows = which[0]
            update.rows, update.is_prefix = rows, is_virtual[0] & self.is_prefix[rows]
        if self.table is None:
            kwargs["input_ids"] = ids.masked_fill(is_virtual, 0)
        elif self.stand_in is not None:
            kwargs["input_ids"] = ids.masked_fill(is_virtual, self.stand_in)
            with stand_ins(self.embed, partial(self._put, which, is_virtual)):
                return self._checked(update, forward(*args, **kwargs))
        elif is_plain_table(self.embed):
            kwargs["input_ids"], kwargs["inputs_embeds"] = None, soft_embedding(ids, self.embed.weight, self.table)
        else:
            text = self.embed(ids.masked_fill(is_virtual, 0))
            kwargs["input_ids"], kwargs["inputs_embeds"] = None, self._put(which, is_virtual, text)
        return self._checked(update, forward(*args, **kwargs))

    def _put(self, which: Tensor, is_virtual: Tensor, text: Tensor) -> Tensor:
        """Embeddings [1, T, E] with soft prompts' rows in place of stand-ins'; others, of images say, stay."""
        if self.table is None or text.shape[:2] != is_virtual.shape:
            return text
        return torch.where(is_virtual[..., None], self.table[which].to(text.dtype), text)

    def _checked(self, update: _Update, output: Any) -> Any:
        if not update.layers or not update.layers.issuperset(self.pairs):  # some read another layer's (Gemma 3n)
            raise NotImplementedError(
                "continuous batching (generate_batch): the attention of this model does not read pages of keys and "
                "values in each layer, so requests would see one another, or not their prefix: call generate on padded "
                "batches"
            )
        return output

    def at(self, layer: int, device: torch.device, dtype: torch.dtype) -> KeyValue | None:
        """Keys and values [Hkv, N, D] of all virtual tokens in a layer."""
        pair = self.pairs.get(layer)
        if pair is not None and (pair[0].device != device or pair[0].dtype != dtype):
            pair = self.pairs[layer] = pair[0].to(device, dtype), pair[1].to(device, dtype)
        return pair


class WithVirtual(list[int]):
    """The ids of a request with those of its virtual tokens before its text."""


class _Update:
    """In place of `cache.update`: a layer's keys and values of virtual tokens are those of their prefixes.

    Args:
        cache: transformers' cache of pages.
        ids: the virtual tokens.

    Attributes:
        rows: of each token of the call that runs which virtual token it is; None: none is.
        is_prefix: which of the tokens are virtual ones of a prefix.
        layers: those that have put their keys and values into the pages in that call.
    """

    def __init__(self, cache: Any, ids: VirtualIds) -> None:
        self.update, self.ids = cache.update, ids
        self.rows: Tensor | None = None
        self.is_prefix: Tensor | None = None
        self.layers: set[int] = set()

    @torch.compiler.disable  # as all that reads and writes pages is
    def __call__(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As the cache's: keys and values [1, Hkv, T, D] of the tokens of all requests in the call."""
        if layer_idx in self.layers:
            raise NotImplementedError(
                "continuous batching (generate_batch): the attention of this model does not read pages of keys and "
                "values as transformers' own does, but several times a layer: call generate on padded batches"
            )
        self.layers.add(layer_idx)
        pair = None if self.rows is None else self.ids.at(layer_idx, key_states.device, key_states.dtype)
        if pair is not None:
            if pair[0].shape[0] != key_states.shape[1]:  # JetMoe repeats its keys after they are in the cache
                raise NotImplementedError(
                    f"continuous batching (generate_batch): layer {layer_idx} has pages of {key_states.shape[1]} heads "
                    f"and a prefix of {pair[0].shape[0]}: call generate on padded batches"
                )
            key_states, value_states = self._put(pair[0], key_states), self._put(pair[1], value_states)
        return self.update(key_states, value_states, layer_idx, *args, **kwargs)

    def _put(self, virtual: Tensor, states: Tensor) -> Tensor:
        assert self.rows is not None
        assert self.is_prefix is not None
        rows, is_prefix = self.rows.to(states.device), self.is_prefix.to(states.device)
        return torch.where(is_prefix[:, None], virtual[:, rows], states)


def _update_of(cache: Any, ids: VirtualIds) -> _Update:
    """What stands in place of `cache.update`; put there by the first call."""
    update = cache.__dict__.get("update")
    if not isinstance(update, _Update):
        update = cache.update = _Update(cache, ids)
    return update


def _length(prefix: LayerPrefixes) -> int:
    """P of a prefix, which every layer has."""
    (length,) = {pair[0].shape[1] for pair in prefix if pair is not None}
    return length


def _of_all(lengths: dict[Task, int], prefixes: dict[Task, LayerPrefixes], layer: int) -> KeyValue:
    """Keys and values [Hkv, N, D] of a layer for all virtual tokens; zeros for those of soft prompts."""
    pairs = {task: prefix[layer] for task, prefix in prefixes.items()}
    some = next(iter(pairs.values()))
    assert some is not None
    joined = []
    for which, like in enumerate(some):
        parts = []
        for task, length in lengths.items():
            pair = pairs.get(task)
            parts.append(like.new_zeros(like.shape[0], length, like.shape[2]) if pair is None else pair[which])
        joined.append(torch.cat(parts, 1))
    return joined[0], joined[1]
