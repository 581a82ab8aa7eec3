"""What is tried: learning rates and numbers of virtual tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...nn import Config


@dataclass(frozen=True)
class Candidate:
    """One way to train.

    Attributes:
        learning_rate: of AdamW.
        config: what to train; its `num_virtual_tokens` is set.

    Examples:
        >>> from prefixcore.training.tuning import Candidate
        >>> Candidate(2e-3, prefixcore.PrefixTuningConfig(num_virtual_tokens=8)).name
        'P 8, rate 0.002'
    """

    learning_rate: float
    config: Config

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be a finite number above 0, got {self.learning_rate}")
        if self.config.num_virtual_tokens is None:
            raise ValueError("a candidate's config must say its num_virtual_tokens")

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        assert self.config.num_virtual_tokens is not None
        return self.config.num_virtual_tokens

    @property
    def name(self) -> str:
        """What tells it from the others of a grid."""
        return f"P {self.num_virtual_tokens}, rate {self.learning_rate:g}"


def grid(config: Config, lengths: Sequence[int], learning_rates: Sequence[float]) -> list[Candidate]:
    """Each length with each learning rate.

    Args:
        config: what all of them have in common.
        lengths: numbers of virtual tokens.
        learning_rates: of AdamW.

    Raises:
        ValueError: a length or a learning rate that is out of range.

    Examples:
        >>> from prefixcore.training.tuning import grid
        >>> candidates = grid(prefixcore.PrefixTuningConfig(num_virtual_tokens=8), [4, 8], [1e-3, 4e-3])
        >>> [candidate.name for candidate in candidates]
        ['P 4, rate 0.001', 'P 4, rate 0.004', 'P 8, rate 0.001', 'P 8, rate 0.004']
    """
    return [
        Candidate(rate, dataclasses.replace(config, num_virtual_tokens=length))
        for length in dict.fromkeys(lengths)
        for rate in dict.fromkeys(learning_rates)
    ]
