"""How a text is distilled."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

STARTS = ("match", "mass", "spread", "first")
MATCHES = ("exact", "contains")


@dataclass(frozen=True)
class DistillOptions:
    """How a long text becomes a short prefix.

    Attributes:
        num_virtual_tokens: P, of the prefix; fewer than the text has tokens.
        questions: how many prompts the model asks itself about parts of the text.
        chat: the text is the system message, and prompts are a user's turns, written by the model's chat template.
        end: text at which an answer ends, such as a line break; None: the token that ends a sequence.
        max_answer_tokens: the longest answer.
        temperature: of the teacher's answers to learn from; 0: greedy ones. Held-out answers are always greedy.
        top_k: how many of the teacher's log-probabilities are kept for each token; all others count as one.
        start: the keys and values that the prefix starts from: P fitted so that they "match" what the text answers the
            prompts' queries; or those of the text's own P tokens with the most attention, the "mass"; of P "spread"
            evenly; or of the "first" P.
        num_frozen_tokens: how many virtual tokens, from the first, stay as they start.
        steps, learning_rate, batch_size: of AdamW; the rate rises over a tenth of the steps and then falls to 0.
            Training ends early where it brings validation prompts no nearer.
        eval_fraction: the share of the prompts that is held out, where no held-out prompts are given.
        match: when an answer is right: "exact": it is the completion, white space around both aside; "contains": the
            completion stands in it, in large letters or small.
        least_share: the least P is searched, by halving, that keeps this share of the full text's score; None: P is P.
        chunk_tokens: the longest part of the text that a question is asked about; None: 128, or 512 with chat. A small
            model asks about what it has just read.
        seed: of the questions, the order and what is held out.

    Raises:
        ValueError: a value is out of range.

    Examples:
        >>> from prefixcore.distill import DistillOptions
        >>> DistillOptions(num_virtual_tokens=32).start
        'match'
    """

    num_virtual_tokens: int
    questions: int = 256
    chat: bool = False
    end: str | None = None
    max_answer_tokens: int = 48
    temperature: float = 0.0
    top_k: int = 20
    start: str = "match"
    num_frozen_tokens: int = 0
    steps: int = 300
    learning_rate: float = 1.5e-2
    batch_size: int = 16
    eval_fraction: float = 0.2
    match: str = "exact"
    least_share: float | None = None
    chunk_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"num_virtual_tokens": 1, "questions": 0, "max_answer_tokens": 1, "top_k": 1, "num_frozen_tokens": 0}
        least |= {"steps": 1, "batch_size": 1, "chunk_tokens": 8, "seed": 0}
        for name, number in least.items():
            value = getattr(self, name)
            if name == "chunk_tokens" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < number:
                raise ValueError(f"{name} must be an integer of at least {number}, got {value!r}")
        for name, choices in (("start", STARTS), ("match", MATCHES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be a finite number above 0, got {self.learning_rate}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a finite number of at least 0, got {self.temperature}")
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be above 0 and below 1, got {self.eval_fraction}")
        if self.least_share is not None and not 0 < self.least_share <= 1:
            raise ValueError(f"least_share must be above 0 and at most 1, or None, got {self.least_share}")
        if self.num_frozen_tokens >= self.num_virtual_tokens:
            raise ValueError(
                f"num_frozen_tokens is {self.num_frozen_tokens} of {self.num_virtual_tokens} virtual tokens: none "
                "would be left to train"
            )
        if self.end == "":
            raise ValueError("end must be a text that is not empty, or None")
        if self.chat and self.end is not None:
            raise ValueError("end cannot be given with chat: the model's chat template ends each turn")

    @property
    def part(self) -> int:
        """The longest part of the text that a question is asked about, in tokens."""
        return self.chunk_tokens or (512 if self.chat else 128)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)
