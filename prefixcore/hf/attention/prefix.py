"""The prefixes of one call: evaluated, and stacked where rows have different ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]
"""A prefix of one layer: key [Hkv, P, D] and value [Hkv, P, Dv]; or of a bank: [N, Hkv, P, D] and [N, Hkv, P, Dv]."""

LayerPrefixes = list[KeyValue | None]
"""A prefix: for each attention layer of the model its key and value; None: that layer has none."""


class PrefixCall:
    """The prefixes that one call of a model sees, on their way to its attention layers.

    It travels with the arguments of the call, so that calls of several threads do not mix, and gradient checkpointing,
    which runs a layer again in the backward, finds the tensors of the first run. It is no tuple, so that what sends or
    casts the tensors in a layer's arguments (accelerate, FSDP) leaves those of all other layers alone.

    Attributes:
        pairs: by layer; [Hkv, P, D] seen by every row, or a bank with `index` and `lengths`.
        index: int64, which entry of the bank each row (packed: sequence) sees, -1: none. None: there is one, for all.
        lengths: int64, by layer: how many virtual tokens each entry has there.
        recorded: where given, layers put the keys and values of their own tokens here, by layer.
        done: how often each module that is several layers (ALBERT shares one) has been called.
    """

    __slots__ = ("pairs", "index", "lengths", "recorded", "done")

    def __init__(
        self,
        pairs: LayerPrefixes,
        index: Tensor | None = None,
        lengths: list[Tensor] | None = None,
        recorded: dict[int, KeyValue] | None = None,
    ) -> None:
        self.pairs, self.index, self.lengths, self.recorded = pairs, index, lengths, recorded
        self.done: dict[tuple[int, ...], int] = {}

    def next_of(self, numbers: tuple[int, ...]) -> int:
        """Which layer a module is that is called now, of those that it is in turn."""
        if len(numbers) == 1:
            return numbers[0]
        count = self.done[numbers] = self.done.get(numbers, 0) + 1
        return numbers[(count - 1) % len(numbers)]

    def at(self, layer: int, device: torch.device) -> KeyValue | None:
        """What a layer sees, on its device; None: nothing."""
        pair = self.pairs[layer] if self.pairs else None
        if pair is not None and pair[0].device != device:  # a model spread over several devices
            pair = self.pairs[layer] = pair[0].to(device), pair[1].to(device)
        return pair

    def detached(self) -> PrefixCall:
        """The same values without their graph."""
        pairs = [None if pair is None else (pair[0].detach(), pair[1].detach()) for pair in self.pairs]
        return PrefixCall(pairs, self.index, self.lengths)


class _Running(threading.local):
    def __init__(self) -> None:  # runs in each thread: compiled code is guarded by what an instance holds
        self.call: PrefixCall | None = None


_running = _Running()


@contextmanager
def running(call: PrefixCall) -> Iterator[None]:
    """A block in which this thread runs a decoder that hands no arguments on to its layers (StableLM, Nemotron)."""
    before, _running.call = _running.call, call
    try:
        yield
    finally:
        _running.call = before


def running_call() -> PrefixCall | None:
    """The call that runs in this thread, for a layer that is not handed it; None: none."""
    return _running.call


def stack(prefixes: Sequence[LayerPrefixes], index: Sequence[int], device: torch.device) -> PrefixCall:
    """One call's prefixes from several.

    Args:
        prefixes: those that some row sees.
        index: which of them each row sees; -1: none.
        device: where the index goes; layers move what they need to their own.
    """
    pairs: LayerPrefixes = []
    lengths = []
    for layer in zip(*prefixes, strict=True):
        present = [pair for pair in layer if pair is not None]
        if not present:
            pairs.append(None)
            lengths.append(torch.zeros(len(prefixes), dtype=torch.long, device=device))
            continue
        longest = max(key.shape[1] for key, _ in present)
        filled = [pair if pair is not None else tuple(x[:, :0] for x in present[0]) for pair in layer]
        lengths.append(torch.tensor([key.shape[1] for key, _ in filled], device=device))
        pairs.append((_stack([key for key, _ in filled], longest), _stack([value for _, value in filled], longest)))
    return PrefixCall(pairs, torch.tensor(list(index), device=device), lengths)


def _stack(tensors: list[Tensor], length: int) -> Tensor:
    """`[N, Hkv, length, D]` of tensors [Hkv, P, D], filled up with zeros."""
    return torch.stack([torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[1])) for x in tensors])
