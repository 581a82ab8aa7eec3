"""Scores on held-out prompts and the seconds of a request, of the prefix and of what else may stand in its place."""

from __future__ import annotations

from collections.abc import Sequence

from ..hf import attach
from .front import Front
from .report import CUT, FULL, NOTHING, PREFIX, START, Report
from .scores import alone, of_teacher, score
from .student import Found, Student
from .targets import Target
from .timing import median, prefill_seconds
from .writing import Asked, Writer


def measure(report: Report, student: Student, found: Found, targets: Sequence[Target], cut: Writer) -> None:
    """Fills in a report.

    Args:
        report: what is filled in.
        student: who trained the prefix; its model is in evaluation mode, and nothing is attached to it.
        found: the prefix, and what it started from.
        targets: held-out prompts with the full text's answers.
        cut: writes the text as far as its first P tokens.
    """
    model, tokenizer, options, padding = student.model, student.tokenizer, student.options, student.padding
    targets = list(targets)
    behind = {id(target.asked): cut.ask(target.asked.prompt).behind for target in targets}

    def behind_cut(asked: Asked) -> list[int]:
        return behind[id(asked)]

    with Front.of(model, cut.front).before(model) as reader:
        of_cut = score(reader, tokenizer, targets, len(cut.front), options, padding, behind_cut)
    with Front.of(model, []).before(model) as reader:
        of_nothing = score(reader, tokenizer, targets, 0, options, padding, alone)
    report.scores = {
        FULL: of_teacher(tokenizer, targets, report.context_tokens, options),
        PREFIX: student.score(found.values, targets),
        START: student.score(found.start.values, targets),
        CUT: of_cut,
        NOTHING: of_nothing,
    }
    asked = sorted((target.asked for target in targets), key=lambda asked: len(asked.alone))[len(targets) // 2]
    bare = {FULL: student.front.ids + asked.behind, CUT: cut.front + behind_cut(asked), NOTHING: asked.alone}
    seconds = {name: median(prefill_seconds(model, ids)) for name, ids in bare.items()}
    with attach(model, student.config(found.values)):
        seconds[PREFIX] = median(prefill_seconds(model, asked.alone))
    report.prefill_seconds = {name: seconds[name] for name in (FULL, PREFIX, CUT, NOTHING)}
