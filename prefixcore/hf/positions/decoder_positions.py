"""Positions of a decoder that counts them itself, from what its cache holds, and takes none: those of BART and its kin.

A prefix is not in the cache, so the module that makes their embeddings is told to count from P on, as it would in PEFT.
Where the cache that a decoder reads begins with the longest prefix of a batch (TrOCR), that of shorter ones is told to
count from less.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.signature import argument_names, as_keywords

_LENGTHS = ("cache_length", "past_key_values_length")
"""What such a module calls the number of tokens before its own: the second up to transformers 5.23, the first since."""


class _Moved(threading.local):
    def __init__(self) -> None:  # runs in each thread: compiled code is guarded by what an instance holds
        self.counts: tuple[int, ...] = ()


_moved = _Moved()


@contextmanager
def moved(counts: Sequence[int]) -> Iterator[None]:
    """A block in which this thread's decoder counts positions of each row from so many on."""
    before, _moved.counts = _moved.counts, tuple(counts)
    try:
        yield
    finally:
        _moved.counts = before


def position_module(decoder: PreTrainedModel) -> nn.Module | None:
    """The module that makes embeddings of the positions that `decoder` counts; None: there is none (T5)."""
    module = getattr(decoder, "embed_positions", None)
    names = argument_names(module) if isinstance(module, nn.Module) else []
    return module if {"position_ids", *_LENGTHS} & set(names) else None


def embed_positions(names: list[str], forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """A call of such a module, whose arguments are `names`."""
    counts = _moved.counts
    if not any(counts):
        return forward(*args, **kwargs)
    kwargs = as_keywords(names, args, kwargs)
    if len(set(counts)) == 1:
        return forward(**_from(names, kwargs, counts[0]))
    outs: list[Tensor] = []
    for row, count in enumerate(counts):
        out = forward(**_from(names, kwargs, count))
        outs.append(out if out.dim() == 2 else out[min(row, out.shape[0] - 1)])
    return torch.stack(outs)


def _from(names: list[str], kwargs: dict[str, Any], count: int) -> dict[str, Any]:
    if kwargs.get("position_ids") is not None:
        return {**kwargs, "position_ids": kwargs["position_ids"] + count}
    length = next(name for name in _LENGTHS if name in names)
    return {**kwargs, length: kwargs.get(length, 0) + count}
