"""Frozen adapters of a bank: kept on the CPU, and copied to the model's device while they are in use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...adapters.module import tensors_of


class _Copy(NamedTuple):
    values: Any
    version: object


class Residency:
    """The copies on a device, of which the least recently used give way.

    Args:
        budget: how many bytes the copies may take together; None: no limit. One batch may need more: its copies are
            made, and not kept.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self._copies: OrderedDict[tuple[str, torch.device], _Copy] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"budget": self.budget}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["budget"])  # type: ignore[misc]

    def get(self, uid: str, values: Any, device: torch.device, version: object = None) -> Any:
        """`values` of an adapter (a tensor, or pairs of them) on `device`; `version` tells when they changed."""
        if _first(values).device == device:
            return values
        with self._lock:
            key = uid, device
            if key in self._copies and self._copies[key].version == version:
                self._copies.move_to_end(key)
                return self._copies[key].values
            self._copies.pop(key, None)
            copy = _to(values, device)
            self._copies[key] = _Copy(copy, version)
            while self.budget is not None and self._copies and self._bytes() > self.budget:
                self._copies.popitem(last=False)
            return copy

    def drop(self, uid: str) -> None:
        """Forgets the copies of an adapter."""
        with self._lock:
            for key in [key for key in self._copies if key[0] == uid]:
                del self._copies[key]

    @property
    def bytes(self) -> int:
        """How many bytes the copies take."""
        with self._lock:
            return self._bytes()

    def _bytes(self) -> int:
        return sum(x.numel() * x.element_size() for copy in self._copies.values() for x in tensors_of(copy.values))


def _first(values: Any) -> Tensor:
    return tensors_of(values)[0]


def _to(values: Any, device: torch.device) -> Any:
    if isinstance(values, Tensor):
        return values.to(device)
    return [(key.to(device), value.to(device)) for key, value in values]
