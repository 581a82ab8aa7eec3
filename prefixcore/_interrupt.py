"""Ctrl-C on the command line: one line that says what was written, at any moment, and the process ends.

In the command line's own process a handler takes the signal from the first import on. It writes its line and exits at
once: an exception would pass through the imports and the C++ code of other libraries, where it may abort the process
or be swallowed. A program that calls `main` with arguments of its own keeps its handler, and its KeyboardInterrupt.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from pathlib import PurePath

INTERRUPTED = 130
"""The exit code of a program that Ctrl-C stopped, as shells have it."""

NOTHING = "nothing was written"

# What to say, and whether the process ends at once. One object, so that the handler never sees half of a change.
_state = ("prefixcore", NOTHING, True)


def is_command_line() -> bool:
    """Whether this process is `python -m prefixcore` or the `prefixcore` script, also while the package is imported."""
    if sys.argv[:1] == ["-m"]:  # what Python puts there until it has found the module
        options = zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
        return any(option.startswith("-") and option.endswith("m") and name == "prefixcore" for option, name in options)
    return bool(sys.argv) and PurePath(sys.argv[0]).name in ("prefixcore", "prefixcore.exe")


def take_over() -> None:
    """Ctrl-C ends the process from here on, unless whoever started it had it ignored."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def let_go() -> None:
    """Ctrl-C is Python's own business again: at the end of the process that is to die of it without a traceback."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def tell(written: str, *, program: str | None = None, at_once: bool = True) -> None:
    """Sets what is said about what was written, if Ctrl-C comes from now on.

    Args:
        written: such as "nothing was written"; true until the next call.
        program: whose message it is; None: as before.
        at_once: False: Ctrl-C raises KeyboardInterrupt, so that what is half done is taken back.
    """
    global _state
    _state = (program or _state[0], written, at_once)


def written() -> str:
    """What was said last about what was written."""
    return _state[1]


def line() -> str:
    """What Ctrl-C says now."""
    program, what, _ = _state
    return f"{program}: stopped; {what}"


def _end(number: int, frame: object) -> None:
    if not _state[2]:
        raise KeyboardInterrupt
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line()}\n".encode(errors="backslashreplace"))
    os._exit(INTERRUPTED)


if is_command_line():
    take_over()
