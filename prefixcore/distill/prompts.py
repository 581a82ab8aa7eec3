"""The user's own prompts: JSON or a table with `prompt` and perhaps `completion`, or plain lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..training.chat_rows import is_conversation
from ..training.columns import USUAL, Columns
from ..training.data import DataError, set_aside
from ..training.prompt_rows import prompt_rows
from ..training.tables import TURNS
from .errors import DistillError
from .options import DistillOptions
from .writing import Prompt

VALIDATION = 0.1
"""The share of the prompts by whose divergence the step is chosen that is kept."""

MOST_HELD_OUT = 128
"""Prompts that are set aside to measure on, where none are given."""


def read_prompts(path: str | Path, *, columns: tuple[str, str] = USUAL) -> list[Prompt]:
    r"""Reads prompts, one a line or row.

    `.csv`, `.tsv` and `.parquet` are tables with the column `prompt` and, where there is a right answer, `completion`.
    Any other file whose first line is a JSON object is read as JSON lines with these fields, and a JSON list of objects
    as these; all others as plain lines, each a prompt. Blank lines are passed over.

    Args:
        path: the file, in UTF-8.
        columns: what prompt and completion are called, such as `("question", "answer")`.

    Raises:
        DistillError: no such file, one that cannot be read, a line that is not what the first one is, or no prompt.

    Examples:
        >>> from pathlib import Path
        >>> from prefixcore.distill import read_prompts
        >>> _ = Path("prompts.jsonl").write_text('{"prompt": "Peru ->", "completion": " Lima"}\n')
        >>> read_prompts("prompts.jsonl")[0].completion
        ' Lima'
    """
    try:
        names = Columns(*columns)
        return [_of_record(row, source, names) for source, row in prompt_rows(Path(path), TURNS, names)]
    except DataError as error:
        raise DistillError(str(error)) from None


def _of_record(record: dict[str, Any], source: str, columns: Columns) -> Prompt:
    if not isinstance(record.get("prompt"), str) and is_conversation(record):
        raise DistillError(
            f"{source}: holds a list of messages, and prompts are single turns; give what the user says as the text "
            "'prompt', and the right answer, if there is one, as the text 'completion'"
        )
    prompt, completion = record.get("prompt"), record.get("completion")
    if not isinstance(prompt, str) or not prompt.strip():
        found = f" (found: {', '.join(record) or 'none'}); what it is called can be said (--prompt-column)"
        what = f"{source}: the field {columns.prompt!r} must be a text that is not empty"
        raise DistillError(what if "prompt" in record else f"{what}{found}")
    if completion is not None and (not isinstance(completion, str) or not completion.strip()):
        raise DistillError(
            f"{source}: the field {columns.completion!r} must be a text that is not empty, or be left out"
        )
    return Prompt(prompt, completion, source)


def split_off(prompts: Sequence[Prompt], fraction: float, seed: int, advice: str) -> tuple[list[Prompt], list[Prompt]]:
    """Sets a fraction of the prompts aside, at least one: `(the others, those set aside)`; each text on one side.

    Raises:
        DistillError: fewer than two of them; `advice` says how to mend it.
    """
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.text, []).append(prompt)
    if len(groups) < 2:
        raise DistillError(f"one prompt is too few, as one is set aside and the others are learnt from: {advice}")
    return set_aside(list(groups.values()), fraction, seed)


def parts(
    prompts: Sequence[Prompt], questions: Sequence[Prompt], held_out: Sequence[Prompt], options: DistillOptions
) -> tuple[list[Prompt], list[Prompt], list[Prompt]]:
    """Prompts to learn from, to choose the step by, and held out; those that are held out are in no other part.

    What is measured on is like what will be asked: set aside from the user's prompts, where there are any.
    """
    aside = list(held_out)
    taken = {prompt.text for prompt in aside}
    own = [prompt for prompt in prompts if prompt.text not in taken]
    more = [prompt for prompt in questions if prompt.text not in taken]
    pool, rest = (own, more) if own else (more, [])
    if not pool:
        raise DistillError("there is no prompt to learn from: give prompts, or questions above 0")
    if not aside:
        # Held out are the user's own prompts alone, where there are any: then more questions would not help.
        advice = "give more prompts of your own" if own else "ask for more questions"
        pool, aside = split_off(pool, options.eval_fraction, options.seed, f"{advice}, or held-out prompts")
        aside = aside[:MOST_HELD_OUT]
    known = {prompt.text for prompt in (*pool, *aside)}
    every = [*pool, *(prompt for prompt in rest if prompt.text not in known)]
    advice = "give more prompts, or ask for more questions"
    training, validation = split_off(every, VALIDATION, options.seed + 1, advice)
    return training, validation, aside
