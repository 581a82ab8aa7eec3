"""A prefix for attention that nothing but its cache reaches: concatenated with keys and values, as PEFT does.

Attention of its own (Bloom, Falcon, MPT) adds what it likes to its scores, but asks the cache for its keys and values.
Here it asks one that puts the prefix before them; the model makes its mask and its biases for as many keys as that
cache says that it has. The cache of the caller holds the text alone, as elsewhere.

It costs what PEFT's prefix does: copies of keys and values for each row and layer, and a mask with four dimensions.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.utils.import_utils import is_tracing

from .prefix import PrefixCall


class PrefixedCache(Cache):
    """A cache as attention layers see it, whose keys and values begin with a prefix.

    Args:
        cache: the cache that it stands before, which is written to as always.
        call: the prefixes of the call, each for all layers.
        layers: which of the model's attention layers has which number in the cache.
        order: [B, P + S], where each key comes from; None: the prefix stands first.

    Attributes:
        was_read: whether a layer has asked for its keys and values.
    """

    def __init__(self, cache: Cache, call: PrefixCall, layers: Mapping[int, int], order: Tensor | None) -> None:
        # Not the constructor of Cache, which makes layers: these are those of `cache`.
        self.cache, self.call, self.numbers, self.order = cache, call, layers, order
        self.layers, self.was_read = cache.layers, False

    def __getattr__(self, name: str) -> Any:
        if name == "cache":  # not made yet
            raise AttributeError(name)
        return getattr(self.cache, name)

    @property
    def num_virtual_tokens(self) -> int:
        """P, of the longest prefix."""
        return num_virtual_tokens(self.call)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Keys and values [B, Hkv, P + S, D] of a layer, after its new ones went into the cache."""
        self.was_read = True
        own = self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        pair = self.call.at(self.numbers[layer_idx], own[0].device)
        assert pair is not None
        return tuple(self._join(prefix, x) for prefix, x in zip(pair, own, strict=True))

    def _join(self, prefix: Tensor, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if self.call.index is None:
            prefix = prefix.expand(rows, -1, -1, -1)
        else:  # what a row does not see of it, the mask hides
            prefix = prefix[self.call.index.to(prefix.device).clamp(min=0)]
        joined = torch.cat((prefix.to(x.dtype), x), 2)
        if self.order is None:
            return joined
        order = whole_order(self.order.to(x.device), joined.shape[2])
        return joined.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        """P and how many tokens the cache holds."""
        return self.cache.get_seq_length(*args, **kwargs) + self.num_virtual_tokens

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """How many keys a layer will see, and the place of the first."""
        length, offset = self.cache.get_mask_sizes(*args, **kwargs)
        return length + self.num_virtual_tokens, offset


def num_virtual_tokens(call: PrefixCall) -> int:
    """P of the longest prefix of a call."""
    pair = call.pairs[0]
    return 0 if pair is None else pair[0].shape[-2]


def extend_mask(mask: Tensor | None, call: PrefixCall) -> tuple[Tensor | None, Tensor | None]:
    """A mask that lets each row see its prefix, and where its keys come from.

    The keys of a row stand as those of a row without padding: padding on the left, the prefix, the text. So a bias that
    goes by how far keys stand apart (MPT) is that of the row by itself.

    Args:
        mask: [B, S], or of four dimensions [B, 1, T, S], boolean or additive; None: all is visible, the
            prefix in every row.
        call: the prefixes.

    Returns:
        The mask of P + S keys, and `order` [B, P + S]; None: there is nothing to hide, and nothing to order.
    """
    virtual = num_virtual_tokens(call)
    if mask is None:
        return None, None
    seen = torch.ones(mask.shape[0], virtual, dtype=torch.bool, device=mask.device)  # of the prefix
    if call.index is not None:
        assert call.lengths is not None
        index = call.index.to(mask.device)
        lengths = call.lengths[0].to(mask.device)[index.clamp(min=0)].where(index >= 0, 0)
        seen = torch.arange(virtual, device=mask.device) < lengths[:, None]
    before = torch.cat((~seen, _visible(mask).cumsum(1) == 0), 1)
    whole = torch.cat((_as_mask(seen, mask), mask), -1)
    if not is_tracing(mask) and not bool(before.any()):
        return whole, None
    order = (~before).long().argsort(dim=1, stable=True)
    along = order if whole.dim() == 2 else order[:, None, None].expand(-1, *whole.shape[1:3], -1)
    return whole.gather(-1, along), order


def _visible(mask: Tensor) -> Tensor:
    """Which tokens [B, S] some query sees."""
    if mask.dim() == 2:
        return mask.bool()
    return (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[:, 0].any(1)


def _as_mask(seen: Tensor, mask: Tensor) -> Tensor:
    """Which virtual tokens [B, P] are seen, in the form of `mask`."""
    if mask.dim() == 2:
        return seen.to(mask.dtype)
    seen = seen[:, None, None].expand(-1, *mask.shape[1:3], -1)
    if mask.dtype == torch.bool:
        return seen
    return torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, torch.finfo(mask.dtype).min)


def whole_order(order: Tensor, length: int) -> Tensor:
    """`order` [B, n] of the first n of `length` keys as one of all: a static cache has room after them."""
    rest = torch.arange(order.shape[1], length, device=order.device)
    return torch.cat((order, rest.expand(order.shape[0], -1)), 1)


class _Running(threading.local):
    def __init__(self) -> None:  # runs in each thread: compiled code is guarded by what an instance holds
        self.cache: PrefixedCache | None = None


_running = _Running()


@contextmanager
def reading(cache: PrefixedCache) -> Iterator[None]:
    """A block in which the attention of this thread reads `cache`."""
    before, _running.cache = _running.cache, cache
    try:
        yield
    finally:
        _running.cache = before


class WindowBuffer:
    """In place of a buffer [1, 1, T, S] that says which key each query sees: a prefix is seen at any distance.

    GPT-Neo's local layers keep their window there, and cut queries and keys out by their places.

    Args:
        module: the attention module.
        name: of its buffer.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def __getitem__(self, where: tuple[slice, slice, slice, slice]) -> Tensor:
        own = self.module._buffers[self.name]
        assert own is not None
        cache = _running.cache
        if cache is None:
            return own[where]
        virtual, (first, last), keys = cache.num_virtual_tokens, (where[2].start, where[2].stop), where[3].stop
        own = own[:, :, first - virtual : last - virtual, : keys - virtual]
        seen = nn.functional.pad(own, (virtual, 0), value=True)
        if cache.order is None:
            return seen
        order = whole_order(cache.order.to(seen.device), keys)[:, None, None].expand(-1, -1, seen.shape[2], -1)
        return seen.expand(order.shape[0], -1, -1, -1).gather(3, order)
