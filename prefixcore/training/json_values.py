"""What JSON holds: values that any template can write, and that are the same when they are read again."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator
from typing import Any

from .data import DataError, is_whole

DEEPEST = 64
"""Levels of lists and objects in one another. Schemas of tools have about ten."""


def parse_json(text: str, source: str) -> Any:
    """The value of a text; DataError, which begins with `source`: there is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise DataError(f"{source}: not valid JSON ({error.msg}, {line}column {error.colno})") from None
    except RecursionError:
        raise DataError(f"{source}: nested too deep for JSON") from None
    except ValueError as error:  # Python reads integers of 4,300 digits at most
        raise DataError(f"{source}: not valid JSON ({error})") from None


def parsed(value: Any, where: str) -> Any:
    """A value, or that of the JSON text in its place."""
    return parse_json(value, where) if isinstance(value, str) else value


def check_json(value: Any, where: str, depth: int = 0) -> None:
    """Raises DataError, which begins with `where`, for what JSON cannot say, or says only to who trusts its writer."""
    if depth > DEEPEST:
        raise DataError(f"{where}: nested more than {DEEPEST} levels deep")
    if isinstance(value, str):
        if not is_whole(value):
            raise DataError(f"{where}: a text holds half of a character (a lone surrogate)")
    elif isinstance(value, dict):
        for name, each in value.items():
            if not isinstance(name, str):
                raise DataError(f"{where}: a name must be a string, got {json_name(name)}")
            check_json(name, where, depth + 1)
            check_json(each, where, depth + 1)
    elif isinstance(value, list):
        for each in value:
            check_json(each, where, depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise DataError(f"{where}: holds {value}, which is no number of JSON's")
    elif value is not None and not isinstance(value, (bool, int)):
        raise DataError(f"{where}: holds a {type(value).__name__}, which JSON does not have; write it as text")


def texts(value: Any) -> Iterator[str]:
    """All texts in a value, the names in objects among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield name
            yield from texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from texts(each)


def to_json(value: Any) -> str:
    """A value as JSON, without white space."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def json_name(value: Any) -> str:
    """What JSON calls a value, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def shown(value: Any) -> str:
    """A value for a message: the beginning of it, where it is long."""
    return reprlib.repr(value)
