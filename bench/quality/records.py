"""What a cell came to: one small JSON file each, so that a run goes on where the last one stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "results" / "cells"
TIMED = FOLDER.with_name("seconds")
"""Where the records of a budget of seconds are, a folder for each multiple of our prefix's seconds."""


def folder_of(times: int) -> Path:
    """Where records go that have so many times the seconds of our prefix's steps as their budget."""
    return TIMED / f"x{times}"


@dataclass(frozen=True)
class Cell:
    """One training, or one way to do without: a task, a method, a seed, and a learning rate where there is one."""

    task: str
    method: str
    seed: int = 0
    rate: float = 0.0

    @property
    def stem(self) -> str:
        """What the names of its record's file, and those of other learning rates, begin with."""
        return f"{self.task}-{self.method.replace('@', '+')}-s{self.seed}"

    @property
    def file(self) -> str:
        """The name of its record's file."""
        return f"{self.stem}-lr{self.rate:g}.json" if self.rate else f"{self.stem}.json"


@dataclass(frozen=True)
class Record:
    """What a cell came to.

    Attributes:
        task, method, seed, rate: the cell.
        steps, batch_size: of the training.
        numbers: how many are trained.
        num_virtual_tokens: P; of a written prompt, how many tokens it has.
        validation: the share of right answers that the learning rate, or the text, was chosen by.
        validation_loss: nats a token; between equal shares it decides.
        right: of each test example "1" if the answer is right, else "0".
        loss: of the test, nats a token.
        cpu_seconds_a_step: of one thread, whatever else the machine did meanwhile; None where that was not taken.
        text: of a written prompt, the one that was chosen.
        setting: dtype, threads, versions and model.
    """

    task: str
    method: str
    seed: int
    rate: float
    steps: int
    batch_size: int
    numbers: int
    num_virtual_tokens: int
    validation: float
    validation_loss: float
    right: str
    loss: float
    cpu_seconds_a_step: float | None
    text: str
    setting: dict[str, str]

    @property
    def cell(self) -> Cell:
        return Cell(self.task, self.method, self.seed, self.rate)

    @property
    def share(self) -> float:
        """Of right answers on the test side."""
        return self.right.count("1") / len(self.right)


def write(record: Record, folder: Path = FOLDER) -> Path:
    """Keep a record; a file that is there is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / record.cell.file
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path


def is_there(cell: Cell, folder: Path = FOLDER) -> bool:
    """Whether the cell has been run."""
    return (folder / cell.file).is_file()


def read(folder: Path = FOLDER, pattern: str = "[!.]*.json") -> list[Record]:
    """All records, or those with such names, in the order of the names."""
    return [Record(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob(pattern))]


def best_rate(records: Iterable[Record]) -> float:
    """The learning rate that did best on the validation side: by right answers, then by loss."""
    return max(records, key=lambda each: (each.validation, -each.validation_loss)).rate


def chosen(records: Sequence[Record], task: str, method: str) -> list[Record]:
    """The records of one method on one task that count, a seed each: with the learning rate found with seed 0."""
    mine = [each for each in records if (each.task, each.method) == (task, method)]
    first = [each for each in mine if each.seed == 0]
    if not first:
        return []
    return at_rate(mine, task, method, best_rate(first))


def at_rate(records: Sequence[Record], task: str, method: str, rate: float) -> list[Record]:
    """The records of one method on one task with one learning rate, a seed each."""
    mine = [each for each in records if (each.task, each.method, each.rate) == (task, method, rate)]
    return sorted(mine, key=lambda each: each.seed)
