"""What tuning found: its trials, its rungs, and the best of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..options import PROMPT_LOSS_WEIGHT, TrainingOptions, TrainingRecord
from .candidates import Candidate


@dataclass
class Trial:
    """What became of a candidate.

    Attributes:
        candidate: what it is.
        name: of its adapter in the bank.
        held_out_loss: `(step, loss)` where it was measured, in nats a completion token; step 0 is before training.
        train_loss: `(step, loss)` of each step, from 1.
        rung: the last one that it took part in, from 1.

    Examples:
        >>> from prefixcore.training.tuning import Candidate, Trial
        >>> candidate = Candidate(2e-3, prefixcore.PrefixTuningConfig(num_virtual_tokens=8))
        >>> Trial(candidate, "candidate-0", held_out_loss=[(0, 3.0), (5, 1.5), (9, 2.0)]).best
        (5, 1.5)
    """

    candidate: Candidate
    name: str
    held_out_loss: list[tuple[int, float]] = field(default_factory=list)
    train_loss: list[tuple[int, float]] = field(default_factory=list)
    rung: int = 1

    @property
    def steps(self) -> int:
        """How long it was trained."""
        return self.held_out_loss[-1][0] if self.held_out_loss else 0

    @property
    def last_loss(self) -> float:
        """The last held-out loss; infinity where it is not a number."""
        loss = self.held_out_loss[-1][1] if self.held_out_loss else math.inf
        return loss if math.isfinite(loss) else math.inf

    @property
    def best(self) -> tuple[int, float]:
        """The step and the held-out loss of the best values."""
        return min(self.held_out_loss, key=lambda each: each[1] if math.isfinite(each[1]) else math.inf)

    def record(
        self,
        batch_size: int,
        seed: int,
        *,
        prompt_loss_weight: float = PROMPT_LOSS_WEIGHT,
        interrupted: bool = False,
    ) -> TrainingRecord:
        """Its training, as `train` would have recorded it."""
        options = TrainingOptions(
            steps=max(1, len(self.train_loss)),
            learning_rate=self.candidate.learning_rate,
            batch_size=batch_size,
            seed=seed,
            prompt_loss_weight=prompt_loss_weight,
            keep="best",
        )
        return TrainingRecord(
            options, self.train_loss, self.held_out_loss, interrupted=interrupted, kept_step=self.best[0]
        )


@dataclass(frozen=True)
class Rung:
    """One round.

    Attributes:
        candidates: how many took part.
        steps: of each in this round.
        at_once: how many shared a batch.
        seconds: of all of it.

    Examples:
        >>> from prefixcore.training.tuning import Rung
        >>> Rung(candidates=4, steps=20, at_once=2, seconds=1.5).candidates
        4
    """

    candidates: int
    steps: int
    at_once: int
    seconds: float


@dataclass
class Tuning:
    """What tuning found.

    Attributes:
        trials: the best first: by the rung reached, then by held-out loss.
        rungs: the rounds.
        seconds: that it took.
        step_seconds: seconds of a step for one candidate, by how many candidates shared a batch.
        interrupted: whether a signal ended it early.

    Examples:
        >>> from prefixcore.training.tuning import Candidate, Trial, Tuning
        >>> config = prefixcore.PrefixTuningConfig(num_virtual_tokens=8)
        >>> trial = Trial(Candidate(2e-3, config), "candidate-0", held_out_loss=[(0, 3.0), (5, 1.5)])
        >>> Tuning([trial], [], seconds=1.5, step_seconds={1: 0.25}).best.last_loss
        1.5
    """

    trials: list[Trial]
    rungs: list[Rung]
    seconds: float
    step_seconds: dict[int, float]
    interrupted: bool = False

    @property
    def best(self) -> Trial:
        """The one whose adapter the bank holds."""
        return self.trials[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        trials = [
            {
                "num_virtual_tokens": trial.candidate.num_virtual_tokens,
                "learning_rate": trial.candidate.learning_rate,
                "rung": trial.rung,
                "held_out_loss": [[step, loss if math.isfinite(loss) else None] for step, loss in trial.held_out_loss],
            }
            for trial in self.trials
        ]
        rungs = [vars(rung) for rung in self.rungs]
        seconds = {str(count): value for count, value in self.step_seconds.items()}
        return {"trials": trials, "rungs": rungs, "seconds": self.seconds, "step_seconds": seconds}
