"""What the command line prints: results on standard output, progress and errors on standard error.

What comes from files, prompts or a model may hold characters that steer a terminal. They are shown as escapes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from .._text import printable
from .failures import UserError, first_line


def one_line(text: str) -> str:
    """`text` on one line, printable, cut where it is absurdly long."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= 2000 else line[:2000] + " ..."


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON in which what is not printable is escaped."""
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False)
    except RecursionError:
        raise UserError("what is to be printed is nested too deep") from None
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def say(text: str) -> None:
    """Progress goes to standard error, so that standard output has the results alone."""
    with contextlib.suppress(OSError):  # whoever closed or filled it does not want to know
        if sys.stderr is not None:
            print(printable(text, keep="\n\t"), file=sys.stderr, flush=True)


def check_open() -> None:
    """Raises UserError if standard output is closed: to be known before the work whose results go there."""
    if sys.stdout is None:
        raise UserError("standard output is closed; the results have nowhere to go")


def results(text: str) -> None:
    """Prints results on standard output.

    Raises:
        UserError: it is closed, or what it goes to is full or gone.
    """
    check_open()
    with _writing():
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()


@contextlib.contextmanager
def _writing() -> Any:
    try:
        yield
    except OSError as error:
        # What is left in the buffer would be tried again, and fail again, when Python ends.
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise UserError(f"standard output cannot be written: {first_line(error)}") from error


def reserve_standard_streams() -> None:
    """Opens the null device where a standard stream is closed, so that no file gets its number and its output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text under one another, every column as wide as its widest cell; each cell on one line, printable."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
