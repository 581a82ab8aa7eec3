"""What came of a distillation: scores side by side, what a request saves, and how the least P was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .scores import Score

FULL, PREFIX, START, CUT, NOTHING = "the full text", "distilled prefix", "its start", "the text cut to P", "nothing"
"""What stands before the prompts, in the table's order."""

LITTLE = 0.5
"""The share of what the text brings below which a note says what else to try."""


@dataclass(frozen=True)
class Trial:
    """One P that was tried.

    Attributes:
        num_virtual_tokens: P.
        score: on the validation prompts: accuracy where all have a right answer, else the share of equal tokens.
        share: of the full text's score.

    Examples:
        >>> from prefixcore.distill import Trial
        >>> Trial(32, score=0.45, share=0.9).num_virtual_tokens
        32
    """

    num_virtual_tokens: int
    score: float
    share: float


@dataclass
class Report:
    """The figures of a distillation.

    Attributes:
        context_tokens: N, of the text as the teacher reads it.
        num_virtual_tokens: P.
        prompts: how many prompts were learnt from, told the step by, and held out.
        scores: by what stands before the held-out prompts.
        prefill_seconds: by the same names, medians of reading one prompt of median length.
        trials: the P's that were tried, where the least was searched.
        share_kept: whether the least P keeps the share that was asked for; None: none was.
        start: how the text's tokens were chosen that the prefix starts from, which they are, and why not as asked for.
        is_prefix_exact: whether the text's own keys and values stood in for it (else its tokens before each prompt).

    Examples:
        >>> from prefixcore.distill import Report
        >>> Report(438, 36, {"training": 60, "validation": 6, "held_out": 61}).tokens_saved
        402
    """

    context_tokens: int
    num_virtual_tokens: int
    prompts: Mapping[str, int]
    scores: dict[str, Score] = field(default_factory=dict)
    prefill_seconds: dict[str, float] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    share_kept: bool | None = None
    start: dict[str, Any] = field(default_factory=dict)
    is_prefix_exact: bool = True

    @property
    def tokens_saved(self) -> int:
        """Of each request."""
        return self.context_tokens - self.num_virtual_tokens

    @property
    def prefill_saved(self) -> float | None:
        """Seconds of each request; None: not measured."""
        if FULL not in self.prefill_seconds:
            return None
        return self.prefill_seconds[FULL] - self.prefill_seconds[PREFIX]

    @property
    def kept(self) -> tuple[str, float] | None:
        """How much the prefix keeps of what the text brings over nothing, 1 being all of it, and in which score.

        That is right answers, where the text brings any, else equal tokens; None: not measured, or it brings nothing.
        """
        if FULL not in self.scores:
            return None
        full, own, nothing = (self.scores[name] for name in (FULL, PREFIX, NOTHING))
        if full.accuracy is not None and own.accuracy is not None and full.accuracy > (nothing.accuracy or 0.0):
            least = nothing.accuracy or 0.0
            return "right answers", (own.accuracy - least) / (full.accuracy - least)
        brought = full.token_agreement - nothing.token_agreement
        return ("equal tokens", (own.token_agreement - nothing.token_agreement) / brought) if brought > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the answers are left out."""
        scores = {}
        for name, score in self.scores.items():
            scores[name] = {key: value for key, value in asdict(score).items() if key != "answers"}
        return {**asdict(self), "scores": scores, "prompts": dict(self.prompts), "tokens_saved": self.tokens_saved}

    def metrics(self) -> dict[str, float]:
        """The prefix's scores on held-out prompts, for a manifest."""
        if PREFIX not in self.scores:
            return {}
        own, full = self.scores[PREFIX], self.scores[FULL]
        found = {
            "agreement": own.agreement,
            "token_agreement": own.token_agreement,
            "divergence": own.divergence,
            "accuracy": own.accuracy,
            "accuracy_of_the_full_text": full.accuracy,
        }
        return {name: value for name, value in found.items() if value is not None}

    def rows(self) -> list[tuple[str, ...]]:
        """The table, its head first; columns that have nothing to say are left out."""
        has_accuracy = any(score.accuracy is not None for score in self.scores.values())
        head = ("answers equal", "tokens equal", "KL (nats)")
        head = ("before the prompt", "tokens", "prefill", *(("right",) if has_accuracy else ()), *head)
        found: list[tuple[str, ...]] = [head]
        for name, score in self.scores.items():
            seconds = self.prefill_seconds.get(PREFIX if name == START else name)
            found.append(
                (
                    name if name != CUT else f"the text cut to {score.tokens}",
                    f"{score.tokens:,}",
                    "" if seconds is None else f"{1000 * seconds:.0f} ms",
                    *(("" if score.accuracy is None else f"{score.accuracy:.1%}",) if has_accuracy else ()),
                    f"{score.agreement:.2f}",
                    f"{score.token_agreement:.2f}",
                    f"{score.divergence:.3f}",
                )
            )
        return found

    def notes(self) -> list[str]:
        """What a request saves, and how the least P was found, in sentences."""
        found = []
        if FULL in self.prefill_seconds:
            full, own = (1000 * self.prefill_seconds[name] for name in (FULL, PREFIX))
            found.append(
                f"each request saves {self.tokens_saved:,} of {self.context_tokens:,} tokens, and its prefill takes "
                f"{own:.0f} ms in place of {full:.0f} ms"
            )
        if why := self.start.get("why"):
            found.append(why)
        if self.kept is not None and self.kept[1] < LITTLE:
            score, share = self.kept
            found.append(
                f"the prefix keeps {max(0.0, share):.0%} of the {score} that the text brings, which is too little to "
                "serve it in the text's place: learn from more questions (--questions) in more steps (--steps), give "
                "prompts of your own about all that is to be kept (--prompts), or take more than "
                f"{self.num_virtual_tokens:,} virtual tokens for the {self.context_tokens:,}"
            )
        if self.trials:
            tried = ", ".join(f"{trial.num_virtual_tokens}: {trial.share:.0%}" for trial in self.trials)
            found.append(f"share of the full text's score on validation prompts by P: {tried}")
            if not self.share_kept:
                found.append("no P that was tried keeps the share that was asked for; the largest is kept")
        return found
