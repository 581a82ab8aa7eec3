"""Which cells there are, and in which order they are run: what decides most comes first."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from . import records
from .methods import METHODS
from .records import Cell
from .tasks import TASKS

SEEDS = 3
MAIN = [name for name in METHODS if "@" not in name]
LEVERS = [name for name in METHODS if "@" in name]
LEVER_TASKS = ("capitals", "continents", "news", "currencies", "movies")
"""The tasks on which levers are tried, beside the methods themselves."""

TIMED = ("prefix", "prompt", "prefix-text", "peft-prompt-text", "peft-prefix-text", "lora")
"""The methods that are compared at equal seconds, too: ours, PEFT's best, and LoRA."""

NO_OPTION = ("prefix", "prompt")
"""What `prefixcore train` makes with no option set: further seeds take the first of the rates too, its default."""

ROUNDS = (
    ("bare", "written-0", "written-2", "written-8", "prefix", "prompt", "prefix@vocab", "lora"),
    ("peft-prompt-text", "prefix@32", "prompt@32", "prefix@linear", "prefix@one-draw", "prompt@vocab"),
    ("peft-prefix-text", "prefix@instruction", "prompt@instruction", "prompt@linear", "peft-prefix"),
)
"""The methods that are run first: a round on all tasks, each with the first of its learning rates, then the next."""

Stage: TypeAlias = "tuple[str, str, Sequence[int], int | None]"
"""A task, a method, the seeds, and the place of a learning rate; None: all of them."""


def stages(parts: Collection[str], num_seeds: int = SEEDS) -> Iterator[Stage]:
    """In order: the rounds, their other learning rates, the other methods, further seeds."""
    tasks = [name for name in TASKS if name in parts]

    def on(task: str, names: Sequence[str]) -> list[str]:
        return [name for name in names if "@" not in name or task in LEVER_TASKS]

    for place in (0, None):
        for names in ROUNDS:
            for task in tasks:
                yield from ((task, name, [0], place) for name in on(task, names))
    for task in tasks:
        yield from ((task, name, [0], None) for name in on(task, [*MAIN, *LEVERS]))
    for seed in range(1, num_seeds):
        for task in tasks:
            yield from ((task, name, [seed], None) for name in MAIN)


def missing(
    parts: Collection[str] = tuple(TASKS),
    methods: Collection[str] = tuple(METHODS),
    folder: Path = records.FOLDER,
    *,
    all_seeds: bool = False,
    num_seeds: int = SEEDS,
    first_rate: bool = False,
    chosen_in: Path | None = None,
) -> Iterator[Cell]:
    """The cells that have not been run, one after the other as each is needed.

    The first seed tries every learning rate; further seeds take the one that the validation side chose of them, so
    each is only known once the cells before it have been run. With `all_seeds`, those of which it is not known yet
    come too, at the first of the learning rates, to be counted. `folder` has the records, those of a budget of seconds
    have one of their own. With `first_rate` no other learning rate of a method is tried; with `chosen_in`, another
    folder of records, none but the one that was chosen there.
    """
    seen: set[Cell] = set()
    for task, name, seeds, place in stages(parts, num_seeds):
        if name not in methods:
            continue
        rates = METHODS[name].rates or (0.0,)
        rates = rates if place is None else rates[place : place + 1]
        tried = records.read(chosen_in, f"{Cell(task, name, 0).stem}*.json") if chosen_in is not None else []
        if first_rate:
            rates = rates[:1]
        elif tried:
            rates = (records.best_rate(tried),)
        for seed in seeds:
            if seed > 0:
                first = records.read(folder, f"{Cell(task, name, 0).stem}*.json")
                if METHODS[name].is_fixed or not (first or all_seeds):
                    continue
                best = records.best_rate(first) if first else rates[0]
                rates = tuple(dict.fromkeys((best, *(rates[:1] if name in NO_OPTION else ()))))
            for rate in rates:
                cell = Cell(task, name, seed, rate)
                if cell not in seen and not records.is_there(cell, folder):
                    seen.add(cell)
                    yield cell
