"""Rows that hold a prompt: JSON, a table, or plain lines, each a prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .columns import USUAL, Columns
from .data import DataError
from .json_rows import list_rows
from .json_values import json_name, parse_json
from .reading import TABLES, failures


def prompt_rows(path: Path, others: Sequence[str], columns: Columns = USUAL) -> list[tuple[str, dict[str, Any]]]:
    """Where each row stands, and what it holds, by name; a plain line is a `prompt`.

    `.csv`, `.tsv` and `.parquet` are tables. Any other file whose first line is a JSON object is read as JSON lines,
    one that is a JSON list of objects as these; all others as plain lines. Blank lines are passed over, and empty cells
    of a table.

    Args:
        path: the file, in UTF-8.
        others: which of a table's columns are read beside prompt and completion.
        columns: what these two are called in the file; here they have their usual names.

    Raises:
        DataError: no such file, one that cannot be read, a line that is not what the first one is, or no row.
    """
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "no such file"
        raise DataError(f"{path}: {what}; expected JSON lines with the field prompt, or plain lines")
    rows = TABLES.get(path.suffix.lower())
    with failures(path):
        if rows is not None:
            found = list(rows(path, (*columns, *others)))
            if not found:
                names = f"the column {columns.prompt}, and perhaps {columns.completion}"
                raise DataError(f"{path}: no prompts; expected rows with {names}")
            filled = [(source, {name: value for name, value in row.items() if value != ""}) for source, row in found]
            return [(source, columns.renamed(row)) for source, row in filled]
        text = path.read_text(encoding="utf-8-sig")
    # Not splitlines: JSON lets characters such as U+2028 stand as they are in a text.
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: no prompts; expected lines like " + '{"prompt": "..."}, or plain lines')
    if _is_list(text):
        return [(source, columns.renamed(row)) for source, row in list_rows(text, path)]
    if not lines[0][1].lstrip().startswith("{"):
        return [(source, {"prompt": line}) for source, line in lines]
    return [(source, columns.renamed(_object(line, source))) for source, line in lines]


def _is_list(text: str) -> bool:
    """Whether a text is a JSON list of objects, and not plain lines the first of which begins with a bracket."""
    if not text.lstrip().startswith("["):
        return False
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return any(isinstance(item, dict) for item in found)


def _object(line: str, source: str) -> dict[str, Any]:
    record = parse_json(line, source)
    if not isinstance(record, dict):
        raise DataError(f"{source}: expected a JSON object with the field prompt, got {json_name(record)}")
    return record
