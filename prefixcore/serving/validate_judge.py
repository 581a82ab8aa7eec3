"""Whether a server's answer is that of the reference, and, where it is not, whose it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .validate_reference import TOLERANCES, Reference
from .validate_server import Answered

_MOST_COMPARED = 16
"""Adapters that an answer is compared with to find out whose it is."""

_FIRST = 4
"""Tokens by which two models' answers are told apart."""


@dataclass(frozen=True)
class Judgement:
    """An answer beside the reference's.

    Attributes:
        wrong: how many tokens are not the reference's likeliest; those as likely within the tolerance are right.
        tokens: how many were compared.
        largest: the greatest difference of a log-probability; None: the server says none.
        detail: in words, what is wrong.
    """

    wrong: int
    tokens: int
    largest: float | None
    detail: str = ""

    def is_right(self, tolerance: float) -> bool:
        """Whether all tokens are right, and all log-probabilities within the tolerance."""
        return self.wrong == 0 and (self.largest is None or self.largest <= tolerance)


class Judge:
    """Holds answers to a reference.

    Args:
        reference: what is right.
        tolerance: of log-probabilities, in nats; None: by the reference's dtype.
    """

    def __init__(self, reference: Reference, tolerance: float | None = None) -> None:
        self.reference = reference
        self.tolerance = TOLERANCES.get(reference.dtype, 2e-3) if tolerance is None else tolerance
        self._known: dict[tuple[str | None, tuple[int, ...]], tuple[list[int], list[float]]] = {}

    def judge(self, name: str | None, prompt: Sequence[int], answer: Answered, tokens: int) -> Judgement:
        """An answer beside that of the model with an adapter, or of the bare model.

        Args:
            name: the adapter's; None: the bare model.
            prompt: its tokens.
            answer: the server's.
            tokens: how many tokens it was allowed.
        """
        if answer.ids is not None:
            return self._by_tokens(name, prompt, answer, tokens)
        return self._by_text(name, prompt, answer, tokens)

    def is_right(self, name: str | None, prompt: Sequence[int], answer: Answered, tokens: int) -> bool:
        """Whether it is that of the model with an adapter, or of the bare model."""
        return self.judge(name, prompt, answer, tokens).is_right(self.tolerance)

    def are_equal(self, name: str | None, other: str | None, prompt: Sequence[int]) -> bool:
        """Whether two models' answers to a prompt cannot be told apart by their first few tokens."""
        for one in (name, other):
            if (one, tuple(prompt)) not in self._known:
                self._known[one, tuple(prompt)] = self.reference.continuation(one, prompt, _FIRST)
        (first, scores), (second, others) = self._known[name, tuple(prompt)], self._known[other, tuple(prompt)]
        if first != second:
            return False
        return all(abs(a - b) <= 2 * self.tolerance for a, b in zip(scores, others, strict=True))

    def whose(self, name: str | None, prompt: Sequence[int], answer: Answered, tokens: int) -> str:
        """In words, what else an answer is that of, if that can be seen."""
        if name is not None and self.is_right(None, prompt, answer, tokens):
            return "it is the bare model's answer: the prefix is not applied"
        others = [other for other in self.reference.names if other != name]
        for other in others[:_MOST_COMPARED]:
            if self.is_right(other, prompt, answer, tokens):
                return f"it is the answer of {other!r}"
        return "it is the answer of no adapter here, nor of the bare model"

    def _by_tokens(self, name: str | None, prompt: Sequence[int], answer: Answered, tokens: int) -> Judgement:
        assert answer.ids is not None
        ids = [token for token in answer.ids if token not in self.reference.ends]
        ended = len(ids) < tokens and answer.finish == "stop"
        if not ids and not ended:
            return Judgement(1, 1, None, "there is no token")
        end = sorted(self.reference.ends)[:1] if ended else []
        steps = self.reference.score(name, prompt, [*ids, *end])
        if ended:
            # Any of the tokens that end an answer is as good as another.
            steps[-1] = max(
                (self.reference.score(name, prompt, [*ids, one])[-1] for one in self.reference.ends),
                key=lambda step: step.logprob,
            )
        wrong = [i for i, step in enumerate(steps) if step.best - step.logprob > 2 * self.tolerance]
        largest = _largest(answer.logprobs, [step.logprob for step in steps[: len(ids)]])
        detail = ""
        if wrong:
            at = wrong[0]
            detail = f"token {at + 1} is {steps[at].best - steps[at].logprob:.2f} nats less likely than the likeliest"
        return Judgement(len(wrong), len(steps), largest, detail)

    def _by_text(self, name: str | None, prompt: Sequence[int], answer: Answered, tokens: int) -> Judgement:
        ids, logprobs = self.reference.continuation(name, prompt, tokens)
        text = self.reference.text(ids)
        if answer.text.strip() != text.strip():
            return Judgement(1, len(ids), None, f"the text is {answer.text[:40]!r}, not {text[:40]!r}")
        found = answer.logprobs if answer.logprobs and len(answer.logprobs) >= len(logprobs) else None
        return Judgement(0, len(ids), _largest(found, logprobs))


def _largest(found: Sequence[float] | None, expected: Sequence[float]) -> float | None:
    if found is None or not expected or len(found) < len(expected):
        return None
    return max((abs(a - b) for a, b in zip(found, expected, strict=False)), default=None)


def largest(values: Iterable[float | None]) -> float | None:
    """The greatest of the numbers that there are."""
    numbers = [value for value in values if value is not None and not math.isnan(value)]
    return max(numbers) if numbers else None
