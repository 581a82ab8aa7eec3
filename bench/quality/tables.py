"""The tables of docs/quality.md that the records of the tasks are: one function a table, and what is missing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from bench.cells import markdown

from . import plan, records
from .intervals import mean, percent
from .methods import METHODS
from .ours import FROM_A_TEXT
from .records import Record, chosen

NOTHING = "Nothing has been run yet: `make bench-quality`."
TITLES = {
    "capitals": "Countries to capitals",
    "currencies": "Countries to currencies",
    "continents": "Countries to continents",
    "dates": "Dates rewritten",
    "news": "BBC headlines to sections",
    "movies": "Sentences of movie reviews",
    "products": "Sentences of product reviews",
}


def rows_of(found: Sequence[Record]) -> list[str]:
    return [record.right for record in found]


def ranking(kept: Sequence[Record], task: str, kinds: Sequence[str]) -> list[tuple[float, str]]:
    """(share, method) of the methods of these kinds, levers aside, the best first."""
    found = []
    for name, method in METHODS.items():
        if method.kind in kinds and "@" not in name and (mine := chosen(kept, task, name)):
            found.append((mean(rows_of(mine)), name))
    return sorted(found, key=lambda each: -each[0])


def summary(kept: Sequence[Record]) -> str:
    """The best of each kind on each task; where ours is not ahead, that stands in bold."""
    kinds = ("ours", FROM_A_TEXT, "PEFT", "LoRA", "written", "bare")
    rows = []
    for task, title in TITLES.items():
        best = {kind: ranking(kept, task, [kind]) for kind in kinds}
        if not any(best.values()):
            continue
        top = max(found[0][0] for found in best.values() if found)
        cells = [title]
        for found in best.values():
            if not found:
                cells.append("-")
                continue
            share, name = found[0]
            text = f"{100 * share:.0f}" + ("" if METHODS[name].kind in ("bare", "LoRA") else f" {METHODS[name].title}")
            cells.append(f"**{text}**" if share == top else text)
        rows.append(cells)
    header = (
        "% right, held out",
        "prefixcore",
        "the same, from a text",
        "PEFT's prompts",
        "LoRA",
        "written prompt",
        "bare",
    )
    return markdown(header, rows) if rows else NOTHING


def where_others_win(kept: Sequence[Record]) -> str:
    """Each task on which something else than a prompt of ours is ahead, with both figures."""
    lines = []
    for task, title in TITLES.items():
        own, written = (ranking(kept, task, [kind]) for kind in ("ours", FROM_A_TEXT))
        if not own and any(each.task == task for each in kept):
            lines.append(f"- {title}: nothing of ours has been run yet.")
        for share, name in ranking(kept, task, ["PEFT", "LoRA", "written"]):
            if own and share > own[0][0]:
                ours = f"{METHODS[own[0][1]].title} {100 * own[0][0]:.0f} %"
                same = f", {100 * written[0][0]:.0f} % from the same text" if written else ""
                lines.append(f"- {title}: {METHODS[name].title} {100 * share:.0f} %, ours at best {ours}{same}.")
    if lines:
        return "\n".join(lines)
    others = [name for name in plan.MAIN if METHODS[name].kind == "PEFT"]
    run = [name for name in others if any(each.method == name for each in kept)]
    return f"Nowhere among what has been run; of PEFT's prompts that is {len(run)} of {len(others)} settings."


def task_table(kept: Sequence[Record], task: str, names: Sequence[str]) -> str:
    """A row a method."""
    rows = []
    for name in names:
        mine = chosen(kept, task, name)
        if not mine:
            continue
        record = mine[0]
        trained = METHODS[name].attach is not None
        rows.append(
            [
                METHODS[name].title,
                f"{record.numbers:,}" if trained else "-",
                str(record.num_virtual_tokens or "-"),
                f"{record.rate:g} (of {tried(kept, task, name)})" if trained else "-",
                percent(rows_of(mine)),
                f"{mean_loss(mine):.2f}",
                "any" if METHODS[name].is_fixed else str(len(mine)),
            ]
        )
    header = ("", "numbers trained", "tokens", "learning rate (of how many)", "% right (95 %)", "loss", "seeds")
    return markdown(header, rows)


def mean_loss(records: Sequence[Record]) -> float:
    """Over the seeds, as the share of right answers is."""
    return statistics.mean(each.loss for each in records)


def tried(kept: Sequence[Record], task: str, method: str) -> int:
    """How many learning rates the one that is shown was chosen from."""
    return len({each.rate for each in kept if (each.task, each.method, each.seed) == (task, method, 0)})


def of_tasks(kept: Sequence[Record], names: Sequence[str]) -> str:
    """The tables of all tasks, those of nothing left out."""
    parts = []
    for task, title in TITLES.items():
        if any(chosen(kept, task, name) for name in names):
            size = len(chosen(kept, task, next(n for n in names if chosen(kept, task, n)))[0].right)
            parts += [f"### {title}", f"{size} held out.", task_table(kept, task, names)]
    return "\n\n".join(parts) or NOTHING


LEVERS_OF = {
    "prefix": "prefix",
    "prompt": "soft prompt",
    "peft-prefix-text": "PEFT prefix, from a text",
    "peft-prompt-text": "PEFT prompt, from a text",
}
"""What has levers, and what pages call it."""


def levers(kept: Sequence[Record]) -> str:
    """What one change does to the prefix and to the soft prompt, a column a task."""
    tasks = [task for task in TITLES if any("@" in each.method and each.task == task for each in kept)]
    if not tasks:
        return NOTHING
    parts = []
    for base, title in LEVERS_OF.items():
        rows = []
        for name in (base, *(each for each in plan.LEVERS if each.startswith(f"{base}@"))):
            found = [chosen(kept, task, name) for task in tasks]
            cells = [f"{percent(rows_of(mine))}, loss {mean_loss(mine):.2f}" if mine else "-" for mine in found]
            if first := next((mine[0] for mine in found if mine), None):
                named = f"{title} as it is" if name == base else METHODS[name].title
                rows.append([named, f"{first.numbers:,}", *cells])
        parts.append(markdown((title, "numbers trained, about", *(TITLES[task] for task in tasks)), rows))
    return "\n\n".join(parts)


def times_run() -> list[int]:
    """The multiples of our prefix's seconds that something was run for."""
    return sorted(int(each.name[1:]) for each in records.TIMED.glob("x*"))


def equal_seconds() -> str:
    """A row a method, a column a task: right answers, and in how many steps; a table for each budget of seconds."""
    parts = []
    for times in times_run():
        kept = records.read(records.folder_of(times))
        tasks = [task for task in TITLES if any(each.task == task for each in kept)]
        rows = []
        for name in [*plan.TIMED, *plan.LEVERS]:
            cells = []
            for task in tasks:
                mine = chosen(kept, task, name)
                if not mine:
                    cells.append("-")
                    continue
                steps = statistics.mean(each.steps for each in mine)
                cells.append(f"{percent(rows_of(mine))}, loss {mean_loss(mine):.2f}, {steps:.0f} steps")
            if any(cell != "-" for cell in cells):
                base, _, lever = name.partition("@")
                rows.append([f"{base}, {METHODS[name].title}" if lever else METHODS[name].title, *cells])
        title = "the seconds of our prefix's 60 steps" if times == 1 else f"{times} times as many seconds"
        parts.append(markdown((title, *(TITLES[task] for task in tasks)), rows))
    return "\n\n".join(parts) or "Not run: `python -m bench.quality run --seconds 1`."


def missing(folder: Path = records.FOLDER) -> str:
    """How many cells of each task have not been run, with the command that runs them."""
    counts: dict[str, int] = {}
    for cell in plan.missing(folder=folder, all_seeds=True):
        counts[cell.task] = counts.get(cell.task, 0) + 1
    rows = [[TITLES[task], str(count), f"`make bench-quality PARTS={task}`"] for task, count in counts.items()]
    return markdown(("not run yet", "cells", "what runs them"), rows) if rows else "Nothing is missing."


def setting(kept: Sequence[Record]) -> str:
    """What it all was run with."""
    if not kept:
        return NOTHING
    said = sorted({", ".join(f"{name} {value}" for name, value in each.setting.items()) for each in kept})
    steps = sorted({(each.steps, each.batch_size) for each in kept if each.steps})
    budget = ", ".join(f"{count} steps of {size} examples" for count, size in steps)
    return f"{budget}. {'; '.join(said)}."
