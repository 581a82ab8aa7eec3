"""The vocabulary's vectors that are nearest to given ones, found a part of the vocabulary at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

TOP = 5
SAMPLE = 128
"""How many tokens, and how many random directions, say what a similarity is worth."""

CHUNK = 4096
"""Tokens of the vocabulary at once."""


@dataclass
class Nearest:
    """The best so far for targets [N, F]: cosines and ids, [N, up to TOP], the best first.

    `apart_from` names for each target one id that is passed over, -1: none.
    """

    targets: Tensor
    apart_from: Tensor
    cosines: Tensor
    ids: Tensor

    @classmethod
    def of(cls, targets: Tensor, apart_from: Tensor | None = None) -> Nearest:
        """Nothing found yet."""
        n = len(targets)
        unit = functional.normalize(targets.float(), dim=1)
        if apart_from is None:
            apart_from = torch.full((n,), -1, device=unit.device)
        return cls(
            unit,
            apart_from.to(unit.device),
            unit.new_zeros(n, 0),
            torch.zeros(n, 0, dtype=torch.long, device=unit.device),
        )

    def see(self, ids: Tensor, vectors: Tensor) -> None:
        """Takes a part of the vocabulary into account: ids [M] and their vectors [M, F]."""
        cosines = self.targets @ functional.normalize(vectors.float(), dim=1).T
        cosines = cosines.masked_fill(ids == self.apart_from[:, None], -torch.inf)
        cosines = torch.cat([self.cosines, cosines], 1)
        all_ids = torch.cat([self.ids, ids.expand(len(self.targets), -1)], 1)
        self.cosines, order = cosines.topk(min(TOP, cosines.shape[1]), 1)
        self.ids = all_ids.gather(1, order)


def median_best(found: Nearest) -> float:
    """The median over the targets of the best cosine."""
    return float(found.cosines[:, 0].median())


def sample_ids(size: int, seed: int = 0) -> Tensor:
    """Ids of up to SAMPLE tokens, in order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator)[:SAMPLE].sort().values


def random_directions(width: int, device: torch.device) -> Tensor:
    """SAMPLE directions that mean nothing, [SAMPLE, width]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SAMPLE, width, generator=generator).to(device)


def chunks(size: int) -> list[range]:
    """The vocabulary in parts."""
    return [range(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK)]


def percentiles(values: Tensor | Iterable[float]) -> dict[str, float]:
    """The least, the 5th, 50th and 95th percentile and the greatest of values."""
    x = torch.as_tensor(values if isinstance(values, Tensor) else list(values)).double().flatten()
    places = torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0], dtype=torch.float64)
    ordered = x.sort().values  # torch.quantile refuses more than sixteen million values
    at = (places * (len(x) - 1)).round().long()
    return dict(zip(("least", "p5", "median", "p95", "greatest"), ordered[at].tolist(), strict=True))
