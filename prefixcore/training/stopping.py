"""Ctrl-C and SIGTERM as a request to stop after the step that runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C (or SIGTERM) into a request to stop: the context value says whether one came.

    A second signal acts as it would have without this, so that a hanging step can still be stopped.
    Outside the main thread, where Python cannot set handlers, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    stopped = threading.Event()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            # None: a handler set by C code, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def request(number: int, frame: object) -> None:
        stopped.set()
        restore()

    for number in previous:
        signal.signal(number, request)
    try:
        yield stopped.is_set
    finally:
        restore()
