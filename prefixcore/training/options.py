"""How to train, and what happened in a training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from numbers import Integral
from typing import Any

PROMPT_LOSS_WEIGHT = 0.3
"""What the mean loss of prompts' tokens is multiplied by, if nothing else is asked for."""

ACTIVATION_DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        steps: optimizer steps.
        learning_rate: of AdamW, after the warm-up.
        batch_size: examples a step.
        warmup_steps: steps over which the learning rate rises from 0.
        schedule: "constant", or "linear" (falls to 0 at the last step).
        weight_decay: of AdamW.
        max_grad_norm: gradients are scaled down to this norm; None: never.
        seed: decides the order of the examples.
        eval_every: steps between two held-out losses; 0: at the start and the end only.
        average: whether what is left, and what held-out losses are of, is the average of the steps' values, the later
            ones the more (Shamir and Zhang, arXiv:1212.1824), in place of one step's. It reaches over about a quarter
            of the steps and takes the memory of the trained numbers once more.
        prompt_loss_weight: what the mean loss of the prompts' tokens is multiplied by before it is added to that of the
            answers, which is what losses in the record are of (Instruction Modelling, arXiv:2405.14394). Of a prompt of
            more than 64 tokens as many are drawn anew each step. 0: answers alone are learnt.
        keep: the values that are left when training ends: of the "last" step, or of the "best" held-out loss, the start
            included. A training that a signal ends leaves its last step's.
        cache_activations: "memory" or "disk": what the layers below the trained prefix make of each example is kept in
            the first epoch, and later ones begin at its first layer. None: it is not.
        activation_dtype: of what is kept, such as "bfloat16"; None: the model's, with which nothing is lost.
        early_stopping_patience: training ends after as many held-out losses in a row that are not below the least one
            before; None: never.

    Raises:
        ValueError: a value is out of range, or `activation_dtype` is given and nothing is kept.

    Examples:
        >>> from prefixcore.training import TrainingOptions
        >>> options = TrainingOptions(steps=200, learning_rate=5e-3, schedule="linear")
        >>> options.batch_size, options.warmup_steps
        (8, 0)
    """

    steps: int = 100
    learning_rate: float = 2e-3
    batch_size: int = 8
    warmup_steps: int = 0
    schedule: str = "constant"
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    seed: int = 0
    eval_every: int = 0
    average: bool = True
    prompt_loss_weight: float = PROMPT_LOSS_WEIGHT
    keep: str = "last"
    early_stopping_patience: int | None = None
    cache_activations: str | None = None
    activation_dtype: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup_steps", 0), ("eval_every", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
            if not least <= int(value) < 2**63:
                raise ValueError(
                    f"{name} must be at least {least}{' and below 2**63' if int(value) > 0 else ''}, got {value}"
                )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0 and finite, got {self.learning_rate}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")
        if not 0 <= self.prompt_loss_weight < math.inf:
            raise ValueError(f"prompt_loss_weight must be at least 0 and finite, got {self.prompt_loss_weight}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0 or None, got {self.max_grad_norm}")
        if self.schedule not in ("constant", "linear"):
            raise ValueError(f"schedule must be 'constant' or 'linear', got {self.schedule!r}")
        if self.keep not in ("best", "last"):
            raise ValueError(f"keep must be 'best' or 'last', got {self.keep!r}")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(f"early_stopping_patience must be at least 1 or None, got {self.early_stopping_patience}")
        if self.cache_activations not in (None, "memory", "disk"):
            raise ValueError(f"cache_activations must be 'memory', 'disk' or None, got {self.cache_activations!r}")
        if self.activation_dtype not in (None, *ACTIVATION_DTYPES):
            raise ValueError(
                f"activation_dtype must be one of {', '.join(map(repr, ACTIVATION_DTYPES))} or None, "
                f"got {self.activation_dtype!r}"
            )
        if self.activation_dtype is not None and self.cache_activations is None:
            raise ValueError("activation_dtype is of what cache_activations keeps, and cache_activations is None")

    def lr_factor(self, step: int) -> float:
        """What the learning rate is multiplied by at `step` (0 is the first)."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "linear":
            return max(0.0, (self.steps - step) / max(1, self.steps - self.warmup_steps))
        return 1.0


@dataclass
class TrainingRecord:
    """What happened in a training run.

    Attributes:
        options: how it was trained.
        train_loss: `(step, loss)` of each step, from 1; nats per completion token.
        held_out_loss: `(step, loss)` where it was evaluated; step 0 is before training.
        step_seconds: seconds of each step, evaluation aside.
        interrupted: whether a signal stopped it before the last step.
        asked_to_stop: whether a signal came at all, also while the last held-out loss was measured.
        stopped_early: whether it ended because the held-out loss no longer fell.
        kept_step: the step whose values were left; 0: the start's.

    Examples:
        >>> from prefixcore.training import TrainingOptions, TrainingRecord
        >>> record = TrainingRecord(TrainingOptions(steps=2), train_loss=[(1, 2.0), (2, 1.5)])
        >>> record.steps_done, record.interrupted
        (2, False)
    """

    options: TrainingOptions
    train_loss: list[tuple[int, float]] = field(default_factory=list)
    held_out_loss: list[tuple[int, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    interrupted: bool = False
    asked_to_stop: bool = False
    stopped_early: bool = False
    kept_step: int = 0

    @property
    def steps_done(self) -> int:
        """How many steps were made."""
        return len(self.train_loss)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)
