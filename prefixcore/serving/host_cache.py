"""Prefixes that were read, ready to be written into a worker's cache, within a bound of memory."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class HostPrefix:
    """A prefix as a worker writes it: one (key [P, Hkv, D], value [P, Hkv, Dv]) a layer, of its own heads."""

    pairs: list[tuple[Tensor, Tensor]]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for pair in self.pairs for tensor in pair)


@dataclass
class HostCache:
    """The prefixes that were used last, by content digest.

    Attributes:
        limit: bytes; a prefix that is larger is not kept.
        used: bytes of what is kept.
    """

    limit: int
    used: int = 0
    _kept: OrderedDict[str, HostPrefix] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, digest: str) -> HostPrefix | None:
        """A prefix that is kept, from then on the one that was used last; None: it has to be read."""
        prefix = self._kept.get(digest)
        if prefix is not None:
            self._kept.move_to_end(digest)
        return prefix

    def put(self, digest: str, prefix: HostPrefix) -> None:
        """Keeps a prefix; those that were not used for longest leave until it fits."""
        if digest in self._kept or prefix.num_bytes > self.limit:
            return
        self._kept[digest] = prefix
        self.used += prefix.num_bytes
        while self.used > self.limit:
            _, oldest = self._kept.popitem(last=False)
            self.used -= oldest.num_bytes
