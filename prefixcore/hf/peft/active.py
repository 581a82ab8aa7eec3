"""Which PeftModels are being called in the running thread: outside such a call their base model is bare, as in PEFT."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Active(threading.local):
    def __init__(self) -> None:  # runs in each thread: compiled code is guarded by what an instance holds
        self.stack: tuple[Any, ...] = ()


_active = _Active()


@contextmanager
def activate(owner: Any) -> Iterator[None]:
    """A block in which the virtual tokens of `owner` are seen by the running thread."""
    before = _active.stack
    _active.stack = (*before, owner)
    try:
        yield
    finally:
        _active.stack = before


def is_active(owner: Any) -> bool:
    """Whether the running thread is inside such a block."""
    return any(each is owner for each in _active.stack)
