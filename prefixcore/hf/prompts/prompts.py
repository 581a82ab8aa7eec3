"""The soft prompts of the rows of a call."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


class Prompts:
    """The soft prompts of the rows of a call.

    Attributes:
        values: those that some row has, [P, E] each.
        index: for each row which of `values` it has; -1: none.
        counts: for each row how many virtual tokens.
        longest: the most that a row has. All rows get so many more tokens; what a row has fewer is padding on its left.
    """

    def __init__(self, values: Sequence[Tensor], index: Sequence[int]) -> None:
        self.values, self.index = list(values), list(index)
        self.counts = [0 if i < 0 else len(self.values[i]) for i in self.index]
        self.longest = max(self.counts, default=0)

    @property
    def is_one(self) -> bool:
        """Whether all rows have the same."""
        return len(self.values) == 1 and min(self.index, default=0) >= 0

    @property
    def table(self) -> Tensor:
        """All of `values`, [N, E]."""
        return self.values[0] if len(self.values) == 1 else torch.cat(self.values)

    def table_starts(self) -> list[int]:
        """Where each of `values` begins in `table`."""
        return [0, *itertools.accumulate(len(value) for value in self.values)][:-1]

    def table_rows(self, first: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Where each of the rows' virtual tokens is in `table`, counted from `first`: [B, longest], on the right."""
        starts, rows = self.table_starts(), []
        for i, count in zip(self.index, self.counts, strict=True):
            here = starts[i] if i >= 0 else 0
            rows.append([first] * (self.longest - count) + list(range(first + here, first + here + count)))
        if self.is_one:
            return torch.tensor(rows[:1], device=device, dtype=dtype).expand(len(rows), -1)
        return torch.tensor(rows, device=device, dtype=dtype)


def missing_tokens(counts: Sequence[int], device: torch.device, longest: int | None = None) -> Tensor | None:
    """[B, 1]: how many virtual tokens fewer than the longest each row has; None: all rows have as many."""
    longest = max(counts, default=0) if longest is None else longest
    if min(counts, default=0) == longest:
        return None
    return torch.tensor([[longest - count] for count in counts], device=device)
