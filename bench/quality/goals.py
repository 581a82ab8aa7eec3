"""The goals of the suite, each with what the records say of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TypeAlias

from bench.cells import markdown

from .intervals import mean
from .methods import METHODS
from .ours import FROM_A_TEXT
from .plan import NO_OPTION
from .records import Record, at_rate, chosen
from .tasks import TASKS

CAPITALS, WITHIN, A_PART = 70.0, 2.0, 10


def shares(kept: Sequence[Record], task: str, kind: str, most_numbers: float = float("inf")) -> dict[str, float]:
    """Right answers in percent by method, of one kind and with at most so many trained numbers; levers aside."""
    found = {}
    for name, method in METHODS.items():
        mine = chosen(kept, task, name) if method.kind == kind and "@" not in name else []
        if mine and mine[0].numbers <= most_numbers:
            found[name] = 100 * mean([each.right for each in mine])
    return found


Found: TypeAlias = "tuple[str, bool | None, Collection[str]]"
"""What the records say, whether that is the goal (None: nothing was run), and on which tasks."""


def capitals(kept: Sequence[Record]) -> Found:
    """What `prefixcore train` comes to with no option set, the learning rate neither."""
    found, said = [], []
    for method in (METHODS[name] for name in NO_OPTION):
        if mine := at_rate(kept, "capitals", method.name, method.rates[0]):
            found.append(100 * mean([each.right for each in mine]))
            said.append(
                f"{method.title} {found[-1]:.0f} % (seeds {', '.join(f'{100 * each.share:.0f}' for each in mine)})"
            )
    return ", ".join(said), max(found) >= CAPITALS if found else None, TASKS


def ahead_of_peft(kept: Sequence[Record], kind: str = "ours") -> Found:
    """On which tasks the best of ours is ahead of the best of PEFT's prompts."""
    ahead: list[str] = []
    behind: list[str] = []
    for task in dict.fromkeys(each.task for each in kept):
        ours, others = shares(kept, task, kind), shares(kept, task, "PEFT")
        if ours and others:
            (ahead if max(ours.values()) > max(others.values()) else behind).append(task)
    said = f"ahead on {', '.join(ahead) or 'none'}; not on {', '.join(behind) or 'none'}"
    return said, len(behind) <= 1 if ahead or behind else None, ahead + behind


def beside_lora(kept: Sequence[Record]) -> Found:
    """How far the best of ours with a tenth of LoRA's numbers is from LoRA, on average over the tasks."""
    ways = {}
    for task in dict.fromkeys(each.task for each in kept):
        lora = chosen(kept, task, "lora")
        if lora and (ours := shares(kept, task, "ours", lora[0].numbers / A_PART)):
            ways[task] = max(ours.values()) - 100 * mean([each.right for each in lora])
    if not ways:
        return "", None, ()
    average = sum(ways.values()) / len(ways)
    return f"{average:+.0f} points on average over {len(ways)} tasks", average >= -WITHIN, ways


def table(kept: Sequence[Record]) -> str:
    """A row a goal."""
    goals: dict[str, Callable[[Sequence[Record]], Found]] = {
        f"capitals at least {CAPITALS:.0f} % with no option set": capitals,
        "ahead of PEFT's best prompt at equal steps, on every task but one at most": ahead_of_peft,
        "the same with ours started from the same text as PEFT's": partial(ahead_of_peft, kind=FROM_A_TEXT),
        f"within {WITHIN:.0f} points of LoRA with a tenth of its numbers": beside_lora,
    }
    rows = []
    for goal, measure in goals.items():
        said, met, tasks = measure(kept)
        verdicts = {None: "-", False: "**missed**", True: "met" if set(tasks) >= set(TASKS) else "met so far"}
        rows.append([goal, said or "not run", verdicts[met]])
    return markdown(("goal", "so far", ""), rows)
