"""Learning rates of their own for a prefix's keys or values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize


class Times(nn.Module):
    """Numbers that are kept divided by a factor.

    AdamW moves each number that it is given by about the learning rate, however large its gradient is, so what is kept
    divided by a factor learns at as many times the rate.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, kept: Tensor) -> Tensor:
        return kept * self.factor

    def right_inverse(self, given: Tensor) -> Tensor:
        return given / self.factor


@contextmanager
def scaled_rates(handle: Any, **factors: float) -> Iterator[Sequence[nn.Parameter]]:
    """A block in which the learning rate of `key` or of `value` is so many times that of the other.

    Args:
        handle: of a prefix without a reparameterization, which does not outlive the block.
        factors: by `key` or `value`.
    """
    for layer in handle.module.layers:
        for name, factor in factors.items():
            parametrize.register_parametrization(layer, name, Times(factor))
    yield []
