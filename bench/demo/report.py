"""The demo's closing tables, as text."""

from __future__ import annotations

from collections.abc import Sequence

from prefixcore.training.evaluate import is_right

from .methods import BARE_NAME, Outcome
from .task import END, Task
from .timing import Timing


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join((first, *rest)).rstrip()

    return "\n".join((line(header), line(["-" * width for width in widths]), *map(line, rows)))


def spread(values: Sequence[float], form: str, *, scale: float = 1.0) -> str:
    """The mean; with several different values also the least and the greatest."""
    mean = format(scale * sum(values) / len(values), form)
    if max(values) == min(values):
        return mean
    return f"{mean} ({format(scale * min(values), form)}..{format(scale * max(values), form)})"


def results_table(fixed: Sequence[Outcome], runs: Sequence[Sequence[Outcome]], timing: Timing) -> str:
    """One row a method. `fixed`: those that train nothing; `runs`: the trained ones, one sequence a seed."""
    bare = timing.seconds[BARE_NAME]
    rows = []
    for outcomes in (*([outcome] for outcome in fixed), *zip(*runs, strict=True)):
        seconds = timing.seconds.get(outcomes[0].name)
        rows.append(
            [
                outcomes[0].name,
                spread([outcome.evaluation.exact_match for outcome in outcomes], ".0f", scale=100) + " %",
                spread([outcome.evaluation.loss for outcome in outcomes], ".2f"),
                f"{outcomes[0].trainable:,}",
                f"{seconds:.2f}" if seconds else "-",
                f"{seconds / bare:.2f}" if seconds else "-",
            ]
        )
    return columns(("", "right", "loss", "trained numbers", "s a step", "of bare"), rows)


def answers_table(task: Task, outcomes: Sequence[Outcome], *, every: int = 1) -> str:
    """What each method said about every `every`-th held-out country; `*` marks a right answer."""
    rows = []
    for index in range(0, len(task.held_out), every):
        example = task.held_out[index]
        row = [example.source, example.completion.strip()]
        for outcome in outcomes:
            said = outcome.evaluation.answers[index]
            mark = "*" if is_right(said, example, END) else ""
            row.append(shorten(said.strip()) + mark)
        rows.append(row)
    return columns(("country", "capital", *(outcome.name for outcome in outcomes)), rows)


def shorten(text: str, width: int = 22) -> str:
    """`text` on one line, with at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."
