"""What an adapter is asked while a server is validated: its own held-out prompts where they can be had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters import AdapterError, read_record
from ..training import DataError, read_examples, split
from ..training.columns import Columns

GENERIC = ("Portugal ->", "Q: What is the answer?\nA:", "2 + 3 =", "Once upon a time", "The quick brown fox")


@dataclass(frozen=True)
class Probes:
    """Prompts for one adapter.

    Attributes:
        prompts: the texts.
        source: where they are from, for the report.
    """

    prompts: list[str]
    source: str


def find_probes(folder: Path, given: Mapping[str, Sequence[str]], count: int) -> Probes:
    """Prompts for the adapter in a folder.

    Args:
        folder: the adapter's.
        given: prompts by adapter's name, and under "" for every one.
        count: at most how many.

    Returns:
        Those that were given; else those that the adapter's training held out, if its data are where they were; else
        generic ones.
    """
    named = given.get(folder.name) or given.get("")
    if named:
        return Probes(list(named)[:count], "given")
    try:
        record = read_record(folder)
        data, part = record.get("data"), record.get("split")
        if isinstance(data, str) and isinstance(part, dict) and Path(data).is_file():
            _, held_out = split(read_examples(data, columns=Columns.of(record)), part["fraction"], part["seed"])
            prompts = list(dict.fromkeys(example.prompt for example in held_out))[:count]
            if prompts:
                return Probes(prompts, f"held out of {Path(data).name}")
    except (AdapterError, DataError, OSError):
        pass
    return Probes(list(GENERIC)[:count], "generic")


def read_prompts(path: Path) -> dict[str, list[str]]:
    """Prompts from a file of JSON lines with `prompt`, and `adapter` where one is for an adapter alone.

    Raises:
        DataError: a line is something else.
    """
    import json

    found: dict[str, list[str]] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError:
            fields = None
        prompt = fields.get("prompt") if isinstance(fields, dict) else None
        name = fields.get("adapter", "") if isinstance(fields, dict) else ""
        if not isinstance(prompt, str) or not prompt or not isinstance(name, str):
            raise DataError(f'{path}, line {number}: expected {{"prompt": "...", "adapter": "..."}}, got {line[:60]!r}')
        found.setdefault(name, []).append(prompt)
    if not found:
        raise DataError(f"{path}: holds no prompt")
    return found
