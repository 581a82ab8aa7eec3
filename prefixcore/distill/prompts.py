"""The user's own prompts: JSON lines or a table with `prompt` and perhaps `completion`, or plain lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..training.chat_rows import is_conversation
from ..training.data import DataError, set_aside
from ..training.reading import TABLES, failures
from ..training.tables import PLAIN
from .errors import DistillError
from .options import DistillOptions
from .writing import Prompt

VALIDATION = 0.1
"""The share of the prompts by whose divergence the step is chosen that is kept."""

MOST_HELD_OUT = 128
"""Prompts that are set aside to measure on, where none are given."""


def read_prompts(path: str | Path) -> list[Prompt]:
    r"""Reads prompts, one a line or row.

    `.csv`, `.tsv` and `.parquet` are tables with the column `prompt` and, where there is a right answer, `completion`.
    Any other file whose first line is a JSON object is read as JSON lines with these fields; one whose first line is
    not, as plain lines, each a prompt. Blank lines are passed over.

    Args:
        path: the file, in UTF-8.

    Raises:
        DistillError: no such file, one that cannot be read, a line that is not what the first one is, or no prompt.

    Examples:
        >>> from pathlib import Path
        >>> from prefixcore.distill import read_prompts
        >>> _ = Path("prompts.jsonl").write_text('{"prompt": "Peru ->", "completion": " Lima"}\n')
        >>> read_prompts("prompts.jsonl")[0].completion
        ' Lima'
    """
    path = Path(path)
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "no such file"
        raise DistillError(f"{path}: {what}; expected JSON lines with the field prompt, or plain lines")
    rows = TABLES.get(path.suffix.lower())
    try:
        with failures(path):
            if rows is not None:
                return _of_table(path, list(rows(path, PLAIN)))
            text = path.read_text(encoding="utf-8-sig")
    except DataError as error:
        raise DistillError(str(error)) from None
    # Not splitlines: JSON lets characters such as U+2028 stand as they are in a text.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise DistillError(f"{path}: no prompts; expected lines like " + '{"prompt": "..."}, or plain lines')
    if _is_array(text):  # each of its lines would be a prompt, brackets and all
        raise DistillError(f"{path}: is one JSON array; expected JSON lines: each object on a line of its own, alone")
    if not lines[0][1].lstrip().startswith("{"):
        return [Prompt(line, None, f"{path}, line {number}") for number, line in lines]
    return [_prompt(line, f"{path}, line {number}") for number, line in lines]


def _is_array(text: str) -> bool:
    """Whether a text is a JSON array of objects."""
    if not text.lstrip().startswith("["):
        return False
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return any(isinstance(item, dict) for item in found)


def _prompt(line: str, source: str) -> Prompt:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DistillError(f"{source}: not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise DistillError(f"{source}: expected a JSON object with the field prompt")
    return _of_record(record, source)


def _of_table(path: Path, rows: Sequence[tuple[str, Any]]) -> list[Prompt]:
    """The prompts of a table; an empty completion is none."""
    if not rows:
        raise DistillError(f"{path}: no prompts; expected rows with the column prompt, and perhaps completion")
    return [_of_record({**row, "completion": row.get("completion") or None}, source) for source, row in rows]


def _of_record(record: dict[str, Any], source: str) -> Prompt:
    if not isinstance(record.get("prompt"), str) and is_conversation(record):
        raise DistillError(
            f"{source}: holds a list of messages, and prompts are single turns; give what the user says as the text "
            "'prompt', and the right answer, if there is one, as the text 'completion'"
        )
    prompt, completion = record.get("prompt"), record.get("completion")
    if not isinstance(prompt, str) or not prompt.strip():
        raise DistillError(f"{source}: the field 'prompt' must be a text that is not empty")
    if completion is not None and (not isinstance(completion, str) or not completion.strip()):
        raise DistillError(f"{source}: the field 'completion' must be a text that is not empty, or be left out")
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
