"""What a call of the model hands to the decoder inside: the tasks of its rows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ..attention.prefix import LayerPrefixes
from ..batch.tasks import Rows, Task
from .cached_calls import refuse_packed

ROWS = "prefixcore_rows"
"""The argument by which a model's call hands the rows' tasks, a `RowPrefixes`, to the decoder inside."""


class RowPrefixes:
    """What a model's call hands to the decoder inside.

    Attributes:
        rows: the tasks of the rows.
        computed: the prefixes that soft prompts have been turned into.
        evaluated: the prefixes that one stack of an encoder-decoder has seen, for the other.
    """

    __slots__ = ("rows", "computed", "evaluated")

    def __init__(self, rows: Rows, computed: dict[Task, LayerPrefixes | None]) -> None:
        self.rows, self.computed = rows, computed
        self.evaluated: dict[Task, LayerPrefixes] = {}

    @property
    def tasks(self) -> list[Task]:
        """The tasks that rows see as a prefix, in the order of the stack."""
        return [task for task in self.rows.tasks if task.adapter.is_prefix or task in self.computed]

    def shift(self, task: Task) -> int:
        """How many positions further on a text stands behind the prefix of a task."""
        layers = self.computed.get(task)
        first = None if layers is None else layers[0]
        return task.adapter.shift if first is None else first[0].shape[1]


class _Handed(threading.local):
    def __init__(self) -> None:  # runs in each thread: compiled code is guarded by what an instance holds
        self.rows: RowPrefixes | None = None


_handed = _Handed()


def hand_over(forward: Callable[..., Any], **kwargs: Any) -> Any:
    """A forward of a model that hands no unknown arguments on to the decoder inside (Bloom, Falcon, GPT-J)."""
    refuse_packed(kwargs)
    before, _handed.rows = _handed.rows, kwargs.pop(ROWS, None)
    try:
        return forward(**kwargs)
    finally:
        _handed.rows = before


def pop_handed(kwargs: dict[str, Any]) -> RowPrefixes | None:
    """What a call of the decoder was handed, with its arguments or, where these are not handed on, without."""
    return kwargs.pop(ROWS, None) or _handed.rows
