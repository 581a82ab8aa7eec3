"""The student: a prefix that starts from the text's keys and values, of P virtual tokens or of the least that do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..hf import attach
from ..hf.baking.bake_prefix import ids_to_prefix
from ..nn import PrefixTuningConfig
from ..training import TrainingRecord
from .front import Front, Reader
from .learning import learn
from .options import DistillOptions
from .report import Report, Trial
from .scores import Score, alone, of_teacher, score
from .start import Start, starting_values
from .targets import Target

Values = list[tuple[Tensor, Tensor]]
"""One (key [Hkv, P, D], value [Hkv, P, Dv]) a layer."""


@dataclass(frozen=True)
class Found:
    """What one training has left.

    Attributes:
        values: of the prefix.
        start: what it started from.
        record: of the training.
    """

    values: Values
    start: Start
    record: TrainingRecord


@dataclass(frozen=True)
class Student:
    """Trains prefixes on what the teacher said.

    Attributes:
        model, tokenizer: the model, with nothing attached, and its tokenizer.
        front: the text.
        taught, judged: targets to learn from, and to choose by.
        options: how a text is distilled.
        padding: the id to pad with.
        show_progress: as of `distill`.
        say: as of `distill`.
    """

    model: PreTrainedModel
    tokenizer: Any
    front: Front
    taught: list[Target]
    judged: list[Target]
    options: DistillOptions
    padding: int
    show_progress: bool | None
    say: Callable[[str], None]

    def config(self, values: Values) -> PrefixTuningConfig:
        """A prefix with these values."""
        name = getattr(self.tokenizer, "name_or_path", None) or None
        frozen = min(self.options.num_frozen_tokens, values[0][0].shape[1] - 1)
        return PrefixTuningConfig(init=values, num_frozen_tokens=frozen, tokenizer_name_or_path=name)

    def train(self, count: int) -> Found:
        """A prefix of `count` virtual tokens."""
        own = ids_to_prefix(self.model, self.front.ids) if self.front.pairs is None else self.front.pairs
        start = starting_values(self.model, self.front, count, self.options.start, self.taught, own)
        if start.kind != self.options.start:
            self.say(f"P = {count}: {start.why}")
        with attach(self.model, self.config(start.values)) as handle:
            record = learn(
                handle,
                self.taught,
                self.judged,
                self.options,
                self.padding,
                show_progress=self.show_progress,
                on_held_out=lambda step, loss: self.say(f"step {step}: validation KL {loss:.3f}"),
            )
            return Found(list(handle.bake()), start, record)  # type: ignore[arg-type]

    def search(self, report: Report, on_kept: Callable[[Found], None]) -> tuple[Found, bool]:
        """The prefix of P virtual tokens, and whether a signal ended its training, or came within it.

        With `least_share` that of the least P that keeps it: P is halved until one does not. `on_kept` is given each
        that would be returned if nothing came after it.
        """
        count, share = self.options.num_virtual_tokens, self.options.least_share
        found = kept = self.train(count)
        self._describe(report, kept, count)
        if not found.record.asked_to_stop:
            on_kept(kept)
        while share is not None and not found.record.asked_to_stop:
            own = self.score(found.values, self.judged)
            full = of_teacher(self.tokenizer, self.judged, report.context_tokens, self.options)
            reached, goal = comparable(own, full, self.judged)
            report.trials.append(Trial(count, reached, reached / goal))
            self.say(f"P = {count}: {report.trials[-1].share:.1%} of the full text's score on validation prompts")
            report.share_kept = report.share_kept or reached >= share * goal
            if reached < share * goal:
                break
            if found is not kept:
                kept = found
                self._describe(report, kept, count)
                on_kept(kept)
            if count == 1:
                break
            count //= 2
            found = self.train(count)
        return kept, found.record.asked_to_stop

    def _describe(self, report: Report, kept: Found, count: int) -> None:
        """Puts down which prefix a report is of."""
        report.num_virtual_tokens = count
        report.start = {"kind": kept.start.kind, "places": kept.start.places, "why": kept.start.why}

    def score(self, values: Values, targets: list[Target]) -> Score:
        """The scores of a prefix with these values."""
        with attach(self.model, self.config(values)) as handle:
            reader = Reader(self.model, [], packed=handle.can_pack)
            tokens = handle.num_virtual_tokens
            return score(reader, self.tokenizer, targets, tokens, self.options, self.padding, alone)


def comparable(own: Score, full: Score, targets: Sequence[Target]) -> tuple[float, float]:
    """One number of each: accuracy where every prompt has a right answer and the full text gets one, else equal tokens.

    Of nothing right, nothing is a share.
    """
    if own.accuracy is None or not full.accuracy or any(each.asked.prompt.completion is None for each in targets):
        return own.token_agreement, full.token_agreement
    return own.accuracy, full.accuracy
