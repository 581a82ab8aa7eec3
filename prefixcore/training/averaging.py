"""The average of the parameters over the steps of a training, the later ones the more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

ETA = 3
"""How fast earlier steps are forgotten: the average reaches over about 1 / (ETA + 1) of the steps."""


class Average:
    """Polynomial-decay averaging: Shamir and Zhang, arXiv:1212.1824, section 4.

    After step t, `average += (ETA + 1) / (t + ETA) * (parameter - average)`. A step at a constant learning rate jumps
    about what it looks for; the average does not. As its reach grows with the steps, it needs no number of steps
    beforehand, and the average of the first step is that step's values.

    Attributes:
        parameters: those that are averaged.
        values: the averages, in the parameters' dtype or float32 where that is wider.
        steps: how many steps they are of.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.values: list[Tensor] = [as_wide(parameter).clone() for parameter in parameters]
        self.steps = 0

    def update(self) -> None:
        """Takes in the parameters after a step."""
        self.steps += 1
        decay = (self.steps - 1) / (self.steps + ETA)
        get_ema_multi_avg_fn(decay)(self.values, [as_wide(each) for each in self.parameters], self.steps)

    @torch.no_grad()
    def put(self) -> None:
        """Makes the parameters the averages."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A block in which the parameters are the averages."""
        own = [parameter.detach().clone() for parameter in self.parameters]
        self.put()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, own, strict=True):
                    parameter.copy_(value)


def as_wide(parameter: nn.Parameter) -> Tensor:
    """The values in a dtype in which small steps add up."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
