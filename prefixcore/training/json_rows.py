"""The rows of JSON: an object a line, or one list of objects over any number of lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .data import DataError
from .json_values import json_name, parse_json


def read_json(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file, each with where it stands; `columns` are not needed, as all of them are read.

    Raises:
        DataError: a line, or an item of the list, that is no object.
    """
    with path.open(encoding="utf-8-sig") as lines:
        first = next((line for line in lines if line.strip()), "")
        lines.seek(0)
        if first.lstrip().startswith("["):
            yield from list_rows(lines.read(), path)
            return
        is_first = True
        for number, line in enumerate(lines, start=1):
            if line.strip():
                source = f"{path}, line {number}"
                try:
                    record = parse_json(line, source)
                except DataError as error:
                    if not is_first:
                        raise
                    raise DataError(f"{error}; expected an object on each line, or one list of objects") from None
                yield source, _object(record, source)
                is_first = False


def list_rows(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a list of JSON, each with where it stands.

    Raises:
        DataError: no JSON, or an item is no object.
    """
    found = parse_json(text, str(path))
    for number, record in enumerate(found, start=1):
        source = f"{path}, item {number}"
        yield source, _object(record, source)


def _object(record: Any, source: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"{source}: expected a JSON object, got {json_name(record)}")
    return record
