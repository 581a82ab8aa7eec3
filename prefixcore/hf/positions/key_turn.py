"""How keys turn with their position: pairs of coordinates, each by an angle of its own for every position.

Families differ in which coordinates those are. Llama's halves are [i, i + D/2], Cohere's and GLM's pairs [2i, 2i + 1];
Phi and StableLM turn the first part of a key, multi-head latent attention (DeepSeek) the last; SmolLM3 has layers that
turn nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeyTurn:
    """How the keys of one attention layer turn.

    Attributes:
        width: D, how many numbers a key has.
        first, second: [n], where in a key the two coordinates of each pair stand; empty where no position is in keys.
        frequencies: [n], the angle of each pair for one position, float64.
    """

    width: int
    first: Tensor
    second: Tensor
    frequencies: Tensor

    def __call__(self, key: Tensor, by: Tensor) -> Tensor:
        """Keys [..., P, D] that stand `by` ([] or [P]) positions further on, in float64 on their device."""
        angle = by.double().to(key.device)[..., None] * self.frequencies.to(key.device)
        cos, sin = angle.cos(), angle.sin()
        turned = key.double().clone()
        first, second = self.first.to(key.device), self.second.to(key.device)
        one, other = turned[..., first], turned[..., second]
        turned[..., first] = one * cos - other * sin
        turned[..., second] = other * cos + one * sin
        return turned


def still(width: int) -> KeyTurn:
    """Of a layer in whose keys there is no position."""
    none = torch.empty(0, dtype=torch.long)
    return KeyTurn(width, none, none, torch.empty(0, dtype=torch.float64))


def halves(width: int, frequencies: Tensor, start: int = 0) -> KeyTurn:
    """The coordinates from `start` on turn, of which one of the first half goes with one of the second."""
    first = start + torch.arange(len(frequencies))
    return KeyTurn(width, first, first + len(frequencies), frequencies.double())


def interleaved(width: int, frequencies: Tensor, start: int = 0) -> KeyTurn:
    """The coordinates from `start` on turn, each with its neighbour."""
    first = start + 2 * torch.arange(len(frequencies))
    return KeyTurn(width, first, first + 1, frequencies.double())


def every_turn(width: int, tables: Sequence[Tensor]) -> list[KeyTurn]:
    """All ways in which keys of this width may turn by one of these tables of frequencies, not turning among them."""
    found = [still(width)]
    for table in (*tables, *(-table for table in tables)):  # NanoChat turns the other way
        left = width - 2 * len(table)
        if left >= 0:
            for start in sorted({0, left}):
                found += [halves(width, table, start), interleaved(width, table, start)]
    return found
