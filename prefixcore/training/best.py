"""The parameters at the least held-out loss of a training, and whether that loss still falls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class Best:
    """The least held-out loss so far, and the parameters then.

    Attributes:
        step: whose loss it is.
        loss: the least; infinity: none that is a number yet.
        evaluations_since: how many losses came since that were not below it.
        values: the parameters at `step`, where they are to be remembered.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.step, self.loss, self.evaluations_since = 0, float("inf"), 0
        self.values: list[torch.Tensor] = []

    def see(self, step: int, loss: float, *, remember: bool) -> None:
        """Takes note of a held-out loss; the first of equal ones is the best."""
        if loss < self.loss:
            self.step, self.loss, self.evaluations_since = step, loss, 0
            if remember:
                self.values = [parameter.detach().clone() for parameter in self.parameters]
        else:
            self.evaluations_since += 1

    def has_not_fallen(self, patience: int | None) -> bool:
        """Whether none of the last `patience` losses was below the best."""
        return patience is not None and self.evaluations_since >= patience

    def restore(self) -> int:
        """Puts the best values back; the step that they are of."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.values, strict=True):
                parameter.copy_(value)
        return self.step
