"""Which failures are one line on standard error, and which are bugs and show where they came from."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can mend; the message says what was expected, what came and how to mend it."""


@contextmanager
def user_errors(*kinds: type[BaseException], what: str = "") -> Iterator[None]:
    """Turn exceptions of these kinds into `UserError`; `what` comes before their first line.

    Without `what`, only kinds whose messages are written for the user.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        if out_of_memory(error):
            raise
        raise UserError(f"{what}: {first_line(error)}" if what else str(error)) from error


def message(error: Exception) -> str | None:
    """What the user is told about a failure of any command; None: it is a bug.

    Besides `UserError`: the package's own errors about files and data, whatever the operating system refuses, too
    little memory, and libraries that are not installed.
    """
    if isinstance(error, UserError) or (isinstance(error, ValueError) and _is_ours(type(error))):
        return str(error)
    if out_of_memory(error):
        wanted = re.search(r"allocate ([\d.]+ ?[KMGTi]*B|\d+ bytes)", str(error))
        how_much = f" ({wanted[1]} were wanted)" if wanted else ""
        return f"out of memory{how_much}; take fewer virtual tokens, a smaller --batch-size or shorter texts"
    if isinstance(error, OSError):
        return f"{error.filename}: {first_line(error)}" if error.filename is not None else first_line(error)
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != "prefixcore":
        return f"{error.name} is not installed; pip install 'prefixcore[hf]'"
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch or a GPU had too little memory."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(
        re.search("can't allocate memory|not enough memory|[Ss]torage size calculation overflowed", str(error))
    )


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, with the next one where it ends in a colon; or its name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "prefixcore"
