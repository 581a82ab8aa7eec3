"""What the running thread is inside of: a call of a PeftModel, outside of which its base model is bare, as in PEFT; a
call of a model whose rows get no soft prompt put in.
"""

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
    """A block in which the running thread is inside a call of `owner`."""
    before = _active.stack
    _active.stack = (*before, owner)
    try:
        yield
    finally:
        _active.stack = before


def is_active(owner: Any) -> bool:
    """Whether the running thread is inside such a block, of this very owner."""
    return any(each is owner for each in _active.stack)
