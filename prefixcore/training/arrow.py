"""Rows of Arrow's tables, which Parquet and data sets are, as JSON would hold them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .json_values import parse_json


def rows_of(batch: Any, path: Any, before: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table, each with where it stands.

    Args:
        batch: a table or a batch of records.
        path: of the file that it is from.
        before: how many rows of the file are before it.

    Raises:
        DataError: a text of the type JSON is none.
    """
    kinds = {field.name: field.type for field in batch.schema}
    for number, row in enumerate(batch.to_pylist(), start=before + 1):
        source = f"{path}, row {number}"
        yield (
            source,
            {name: _value(value, kinds[name], f"{source}: the column {name!r}") for name, value in row.items()},
        )


def _value(value: Any, kind: Any, where: str) -> Any:
    """A value of Arrow's type `kind`.

    An object has all fields that another row's has, null where its own has none: those that are null are left out. A
    text of the type JSON is read, and says itself what is null.
    """
    if value is None:
        return None
    if getattr(kind, "extension_name", None) == "arrow.json":
        return parse_json(value, where)
    if isinstance(value, dict):
        return {
            field.name: _value(value[field.name], field.type, where) for field in kind if value[field.name] is not None
        }
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_value(each, kind.value_type, where) for each in value]
    return value
