"""Examples read from files: JSON, CSV, Parquet, and folders of Hugging Face data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from .chat_rows import CHAT, conversation, is_conversation
from .columns import USUAL, Columns
from .data import DataError, Example, is_whole
from .json_rows import read_json
from .json_values import json_name
from .tables import DATASET_FILES, TURNS, read_csv, read_dataset, read_parquet

_Reader = Callable[[Path, Sequence[str]], Iterator[tuple[str, Any]]]

TABLES: dict[str, _Reader] = {".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet}
"""How a file's name ends -> its rows, where it is no JSON."""


def read_examples(path: str | Path, *, chat: bool = False, columns: tuple[str, str] = USUAL) -> list[Example]:
    """Read examples; what the file is called says what it is.

    `.csv` and `.tsv` (text with a header, whose columns commas, semicolons or tabs part), `.parquet` (needs pyarrow), a
    folder that `Dataset.save_to_disk` wrote (needs datasets), and JSON for every other name: an object a line, or one
    list of objects. The whole file is checked before anything is returned. Further columns are ignored.

    Args:
        path: the file or folder.
        chat: each row has `messages`, a list of `{"role": ..., "content": ...}`, in place of `prompt` and `completion`;
            or these two as lists of messages (TRL), or `conversations` (ShareGPT). Beside them `tools` and
            `chat_template_kwargs`, which the model's chat template is told.
        columns: what prompt and completion are called, such as `("question", "answer")`; not for conversations.

    Raises:
        DataError: no such file, one that cannot be read, a library that it needs and that is not installed, a column
            that is missing or holds something else than text (or messages), or no example at all. The message names
            the line or row, and the columns that there are.

    Examples:
        >>> from pathlib import Path
        >>> from prefixcore.training import read_examples
        >>> _ = Path("capitals.csv").write_text("prompt,completion\\nPeru ->, Lima\\n")
        >>> [example] = read_examples("capitals.csv")
        >>> example.completion, example.source
        (' Lima', 'capitals.csv, line 2')
    """
    path, names = Path(path), Columns(*columns)
    fields = "the field messages" if chat else f"the fields {names.prompt} and {names.completion}"
    with failures(path):
        if any((path / name).is_file() for name in DATASET_FILES):
            return _examples(path, read_dataset, "column", chat, names)
        _check_regular(path, f"JSON lines, CSV or Parquet with {fields}, or a folder that Dataset.save_to_disk wrote")
        reader = TABLES.get(path.suffix.lower())
        return _examples(path, reader or read_json, "column" if reader else "field", chat, names)


def read_jsonl(path: str | Path) -> list[Example]:
    """Read one example a line, `{"prompt": str, "completion": str}`; blank lines are passed over.

    The whole file is checked before anything is returned. Further fields are ignored.

    Raises:
        DataError: no such file, one that cannot be read, not UTF-8, a line that is not a JSON object, a field that is
            missing, not a string, no whole characters, or empty (`completion`), or no example at all. The message
            names the line.

    Examples:
        >>> from pathlib import Path
        >>> from prefixcore.training import read_jsonl
        >>> _ = Path("capitals.jsonl").write_text('{"prompt": "Peru ->", "completion": " Lima"}')
        >>> [example] = read_jsonl("capitals.jsonl")
        >>> example.completion
        ' Lima'
    """
    path = Path(path)
    with failures(path):
        _check_regular(path, "JSON lines with the fields prompt and completion")
        return _examples(path, read_json, "field", False, USUAL)


def _check_regular(path: Path, expected: str) -> None:
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "no such file"
        raise DataError(f"{path}: {what}; expected {expected}")


@contextmanager
def failures(path: Path) -> Iterator[None]:
    """A block whose failures to read the file are `DataError`."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _examples(path: Path, rows: _Reader, kind: str, chat: bool, columns: Columns) -> list[Example]:
    make: Callable[..., Example] = conversation if chat else partial(_example, columns=columns)
    examples = [make(row, source, kind) for source, row in rows(path, CHAT if chat else (*columns, *TURNS))]
    if not examples:
        like = '{"messages": [{"role": "user", "content": "..."}, ...]}'
        like = like if chat else f'{{"{columns.prompt}": "...", "{columns.completion}": "..."}}'
        fields = "messages" if chat else f"{columns.prompt} and {columns.completion}"
        raise DataError(
            f"{path}: no examples; expected " + (f"lines like {like}" if kind == "field" else f"rows of {fields}")
        )
    return examples


def _example(record: Mapping[str, Any], source: str, kind: str, columns: Columns) -> Example:
    hint = "; conversations are read with --chat" if is_conversation(record) else ""
    for field in columns:
        if field not in record:
            names = "" if hint else "; what they are called can be said (--prompt-column, --completion-column)"
            raise DataError(
                f"{source}: the {kind} {field!r} is missing (found: {', '.join(record) or 'none'}){hint or names}"
            )
        if not isinstance(record[field], str):
            raise DataError(f"{source}: the {kind} {field!r} must be a string, got {json_name(record[field])}{hint}")
        if not is_whole(record[field]):
            raise DataError(f"{source}: the {kind} {field!r} holds half of a character (a lone surrogate)")
    prompt, completion = (record[field] for field in columns)
    if not completion:
        raise DataError(f"{source}: the {kind} {columns.completion!r} is empty; there is nothing to learn from it")
    return Example(prompt, completion, source)
