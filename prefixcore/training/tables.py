"""The rows of CSV, of Parquet and of a Hugging Face data set on disk, each with where it stands, for messages."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .arrow import rows_of
from .data import DataError

LONGEST_FIELD = 2**31 - 1
"""Characters: the most that the csv module can be told on every system."""

_INSTALL = "pip install 'prefixcore[data]'"

DATASET_FILES = ("dataset_info.json", "dataset_dict.json")
"""One of them is in each folder that `save_to_disk` writes: of a data set, or of several splits."""

TURNS = ("messages", "conversations")
"""The columns that are read beside prompt and completion, for messages about them; the others are ignored."""


def _check_names(names: Sequence[str], columns: Sequence[str], source: str | Path) -> None:
    """Raises DataError if a column that is read is there twice."""
    for name in columns:
        if names.count(name) > 1:
            raise DataError(f"{source}: {names.count(name)} columns are called {name!r}; leave one of them")


@contextmanager
def _long_fields() -> Iterator[None]:
    """A block in which a field may be a whole document: the module's own limit is 131,072 characters."""
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _delimiter(path: Path, columns: Sequence[str]) -> str:
    """What parts the columns: that by which the header has one that is read; else what the file's name says."""
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig") as lines:
        header = next((line for line in lines if line.strip()), "")
    for delimiter in (usual, ",", ";", "\t"):
        if set(columns).intersection(*csv.reader([header.rstrip("\n")], delimiter=delimiter)):
            return delimiter
    return usual


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file of values with a header, which commas part, or tabs (`.tsv`), or semicolons.

    Raises:
        DataError: a row of more or fewer values than the header, or quotes that are not closed.
    """
    with path.open(encoding="utf-8-sig", newline="") as lines, _long_fields():
        rows = csv.reader(lines, delimiter=_delimiter(path, columns), strict=True)
        header: list[str] | None = None
        while True:
            source = f"{path}, line {rows.line_num + 1}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise DataError(f"{source}: not valid CSV ({error})") from None
            if row is None:
                return
            if not row:  # a blank line
                continue
            if header is None:
                header = row
                _check_names(header, columns, source)
            elif len(row) != len(header):
                raise DataError(
                    f"{source}: {len(row)} values, but the header has {len(header)} columns ({', '.join(header)}); "
                    "put values with commas, quotes or line breaks in double quotes"
                )
            else:
                yield source, dict(zip(header, row, strict=True))


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a Parquet file.

    Raises:
        DataError: pyarrow is not installed, or cannot read the file.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        raise DataError(f"{path}: reading Parquet needs pyarrow; {_INSTALL}") from None
    try:
        number = 0
        with ParquetFile(path) as file:
            _check_names(file.schema_arrow.names, columns, path)
            there = [name for name in file.schema_arrow.names if name in columns]
            others = dict.fromkeys(file.schema_arrow.names)  # for messages that name the columns there are
            for batch in file.iter_batches(columns=there):
                for source, row in rows_of(batch, path, number):
                    yield source, row if there else others
                number += batch.num_rows
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file that pyarrow can read ({str(error).splitlines()[0]})") from None


def read_dataset(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a data set that `save_to_disk` wrote.

    Raises:
        DataError: datasets is not installed or cannot read the folder, or it holds several splits.
    """
    if (path / "dataset_dict.json").is_file():
        splits = sorted(part.parent.name for part in path.glob("*/dataset_info.json"))
        first = splits[0] if splits else "train"
        raise DataError(f"{path}: holds the splits {', '.join(splits) or 'none'}; name one of them, as {path / first}")
    try:
        import datasets
    except ModuleNotFoundError:
        raise DataError(f"{path}: reading a data set's folder needs datasets; {_INSTALL}") from None
    try:
        rows = datasets.load_from_disk(str(path)).with_format("arrow")
    except Exception as error:  # what datasets raises for a damaged folder is of any kind
        raise DataError(f"{path}: datasets cannot read it ({type(error).__name__}: {error})") from error
    there = [name for name in rows.column_names if name in columns]
    others = dict.fromkeys(rows.column_names)
    if there:
        rows = rows.select_columns(there)
    number = 0
    for batch in rows.iter(batch_size=1000):
        for source, row in rows_of(batch, path, number):
            yield source, row if there else others
        number += batch.num_rows
