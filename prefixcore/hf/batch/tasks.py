"""Which virtual tokens each batch row, or each packed sequence, has: `task_ids`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..bank.attached import Attached

TASK_IDS = "task_ids"
"""The argument of a model's call that names each row's adapter."""

Key = tuple[str, int]
"""What tells a task from all others, also in a copy of the model."""


class Task(NamedTuple):
    """What a row names: an adapter, or one of the tasks of an adapter that has several."""

    adapter: Attached
    number: int = 0

    def key(self) -> Key:
        """What tells it from all others. No property, of which torch 2.10 compiles none in a named tuple."""
        return self.adapter.uid, self.number


class Rows:
    """The tasks of the rows of a batch, or of the sequences of a packed one.

    Attributes:
        tasks: those that are named, each once.
        index: for each row its place in `tasks`; -1: no virtual tokens. None: every row has the one task.
    """

    def __init__(self, tasks: Sequence[Task], index: list[int] | None = None) -> None:
        self.tasks = list(tasks)
        self.index = index
        if index is not None and index and min(index) == max(index):
            self.index = None
            if index[0] < 0:
                self.tasks = []

    def selecting(self, places: list[int]) -> Rows:
        """The rows at `places`, in this order."""
        if self.index is None:
            return self
        index = [self.index[i] for i in places]
        used = sorted({i for i in index if i >= 0})
        return Rows([self.tasks[i] for i in used], [used.index(i) if i >= 0 else -1 for i in index])

    @property
    def prompts(self) -> list[Task]:
        """The tasks whose virtual tokens are a soft prompt that stands before the text."""
        return [t for t in self.tasks if not t.adapter.is_prefix and t.adapter.virtual_token_ids is None]

    @property
    def placed(self) -> list[Task]:
        """The tasks whose virtual tokens are a soft prompt that stands where special ids are in the text."""
        return [t for t in self.tasks if t.adapter.virtual_token_ids is not None]

    def of(self, tasks: list[Task], num_rows: int) -> list[int]:
        """For each row its place in `tasks`, a part of this object's; -1: none of them."""
        if self.index is None:
            return [0 if tasks else -1] * num_rows
        place = {task: i for i, task in enumerate(tasks)}
        return [-1 if i < 0 else place.get(self.tasks[i], -1) for i in self.index]

    def counts(self, tasks: list[Task], num_rows: int) -> list[int]:
        """For each row how many virtual tokens it has of `tasks`."""
        return [0 if i < 0 else tasks[i].adapter.num_virtual_tokens for i in self.of(tasks, num_rows)]

    def keys(self, num_rows: int) -> list[Key | None]:
        """For each row the key of its task; None: no virtual tokens."""
        if self.index is None:
            return [self.tasks[0].key() if self.tasks else None] * num_rows
        return [None if i < 0 else self.tasks[i].key() for i in self.index]


class _Generating(threading.local):
    def __init__(self) -> None:  # runs in each thread: compiled code is guarded by what an instance holds
        self.tasks: tuple[tuple[Any, Any], ...] = ()


_generating = _Generating()


@contextmanager
def generating(patch: Any, task_ids: Any) -> Iterator[None]:
    """A block in which the rows of calls that do not say otherwise are for `task_ids`, in this thread."""
    before = _generating.tasks
    _generating.tasks = (*before, (patch, task_ids))
    try:
        yield
    finally:
        _generating.tasks = before


def generated_tasks(patch: Any) -> Any:
    """The `task_ids` of the generate that runs in this thread on the model of this patch; None: none."""
    return next((task_ids for each, task_ids in reversed(_generating.tasks) if each is patch), None)


def parse_task_ids(
    task_ids: Any,
    num_rows: int,
    find: Callable[[Any], Task | None],
    what: str = "rows",
    *,
    is_expanded: bool = False,
    hint: Callable[[], str] = str,
) -> Rows:
    """The rows that `task_ids` names.

    Args:
        task_ids: one name, number or None for all rows; or a list, a tensor or an array of one a row.
        num_rows: how many rows, or packed sequences, there are.
        find: the task of a name or a number; None for None and -1; raises for what is not attached.
        what: "rows" or "packed sequences".
        is_expanded: whether each row may have become several (beams, several sequences a row in `generate`).
        hint: makes what is added where there is another number of them than rows.

    Raises:
        ValueError: another number of them than there are rows; a pair that may be one task or two.
    """
    if isinstance(task_ids, (Tensor, np.ndarray, np.generic)):
        if isinstance(task_ids, Tensor):
            _check_readable()
        task_ids = task_ids.reshape(-1).tolist() if task_ids.ndim else task_ids.item()
    may_be_two = num_rows == 2 or (is_expanded and num_rows % 2 == 0)
    if isinstance(task_ids, (str, int)) or task_ids is None or _is_one_task(task_ids, find, may_be_two):
        task = find(task_ids)
        return Rows([] if task is None else [task])
    if not isinstance(task_ids, (list, tuple)):
        raise TypeError(f"task_ids: expected names or numbers, one a row, got {type(task_ids).__name__}")
    each = [one.item() if isinstance(one, np.generic) or _is_number(one) else one for one in task_ids]
    if len(each) != num_rows:
        if not each or num_rows % len(each) or not (is_expanded or len(each) == 1):
            raise ValueError(f"task_ids: expected one for each of {num_rows} {what}, got {len(each)}{hint()}")
        each = [one for one in each for _ in range(num_rows // len(each))]
    place: dict[Task, int] = {}
    index = []
    for one in each:
        task = find(one)
        index.append(-1 if task is None else place.setdefault(task, len(place)))
    return Rows(list(place), index)


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1


def _check_readable() -> None:
    """Compiled code cannot read a tensor, so it breaks the graph; where it may not, that is said."""
    message = (
        "task_ids is a tensor, whose numbers compiled code cannot read: give a list of names or numbers under "
        "fullgraph=True and torch.export"
    )
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break(message)
    elif torch.compiler.is_compiling():
        raise NotImplementedError(message)


def _is_one_task(value: Any, find: Callable[[Any], Task | None], may_be_two: bool) -> bool:
    """Whether it is one task of an adapter that has several, (name, number), and not the tasks of two rows.

    Args:
        value: what was given.
        find: the task of a name or a number.
        may_be_two: whether there may be two rows.

    Raises:
        ValueError: it may be either.
    """
    if not (isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)):
        return False
    if not may_be_two:
        return True
    name, number = value
    task = find(name)
    if task is None or task.adapter.num_tasks == 1:
        return False
    raise ValueError(
        f"task_ids: {value!r} is one task of {name!r}, or {name!r} and the task {number} for two rows: say [{value!r}] "
        f"for the one, [{name!r}, {number}] for the other"
    )
