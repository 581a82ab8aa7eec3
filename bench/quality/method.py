"""What a method is: what it attaches, the learning rates tried for it, and what is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .tasks import Task


@dataclass(frozen=True)
class Attached:
    """A model that has something to train.

    Attributes:
        model: takes batches, and generates.
        parameters: what is trained.
        packed: whether it is trained on packed batches.
        num_virtual_tokens: P, where it has any.
    """

    model: Any
    parameters: Sequence[torch.nn.Parameter]
    packed: bool
    num_virtual_tokens: int = 0

    @property
    def numbers(self) -> int:
        """How many numbers are trained."""
        return sum(each.numel() for each in self.parameters)


Attach = Callable[[Any, Any, Task, int], Any]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: what records call it.
        title: what pages call it.
        kind: "bare", "written", "ours", "ours, from a text", "PEFT" or "LoRA".
        attach: a context manager of (model, tokenizer, task, seed) that gives an `Attached`; None: nothing is trained.
        rates: learning rates that the validation side chooses from.
        options: further options of the training, for all rates.
        texts: candidates of a written prompt, of (task, seed).
    """

    name: str
    title: str
    kind: str
    attach: Attach | None = None
    rates: tuple[float, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    texts: Callable[[Task, int], Sequence[str]] | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether nothing in it is random, so that one seed says all."""
        return self.name in ("bare", "written-0")
