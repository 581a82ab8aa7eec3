"""Texts of a person's: written prompts, and what virtual tokens are started from by hand."""

from __future__ import annotations

import random
from typing import Any

from .method import Method
from .tasks import END, Task

PREFACE = "Below are questions and their answers. Each answer is correct and short, and nothing else is written.\n"

WRITTEN_DRAWS = 3
"""How many draws of examples a written prompt is the best of, by its score on the validation side."""


def written(shots: int) -> Method:
    """An instruction and so many training examples."""

    def texts(task: Task, seed: int) -> list[str]:
        found = []
        for draw in range(WRITTEN_DRAWS if shots else 1):
            examples = random.Random(f"{seed} {draw}").sample(list(task.training), shots)
            found.append(instruction(task) + "".join(each.prompt + each.completion for each in examples))
        return found

    title = f"written prompt, {shots} examples" if shots else "written prompt, no example"
    return Method(f"written-{shots}", title, "written", texts=texts)


def instruction(task: Task) -> str:
    """What a person would write, the labels named where there are a few."""
    if not task.labels:
        return task.instruction
    return f"{task.instruction.rstrip()} One of: {', '.join(task.labels)}.{END}"


def shown(task: Task, shots: int = 2) -> str:
    """The instruction and the first training examples: the text that a person would start virtual tokens from."""
    answers: dict[str, Any] = {}
    for example in task.training:
        answers.setdefault(example.completion, example)
    some = list(answers.values())[:shots]
    return task.instruction + "".join(each.prompt + each.completion for each in some)


def preface(task: Task) -> str:
    """A sentence that fits any task, and the first training examples."""
    return PREFACE + shown(task).removeprefix(task.instruction)
