"""Which of the attached tasks each row of a call has."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attention.refusals import refuse_context_parallelism
from ..batch.packing import refuse_cut_batch
from ..batch.tasks import TASK_IDS, Rows, Task, generated_tasks, parse_task_ids
from ..positions.cache import cache_argument, get_label
from ..positions.model_inputs import restarts
from ..positions.positions import batch_rows

if TYPE_CHECKING:
    from .bank import Bank


def find_task(bank: Bank, task_id: Any) -> Task | None:
    """The task of a number, a name or a pair of a name and a number; None and -1: none.

    Raises:
        ValueError, TypeError: nothing of this name or number is attached.
    """
    if task_id is None or task_id == -1:
        return None
    name, index = task_id if isinstance(task_id, tuple) else (task_id, 0)
    if isinstance(name, str) and name in bank.adapters and 0 <= index < bank.adapters[name].num_tasks:
        return Task(bank.adapters[name], index)
    if isinstance(name, int) and not isinstance(name, bool):
        for adapter in list(bank.adapters.values()):  # another thread may add and remove
            if adapter.first_task <= name < adapter.first_task + adapter.num_tasks:
                return Task(adapter, name - adapter.first_task)
    raise ValueError(f"task_ids: {task_id!r} is not attached; there are {_described(bank)}, and -1 or None")


def _described(bank: Bank) -> str:
    found = []
    for name, a in list(bank.adapters.items()):
        numbers = str(a.first_task) if a.num_tasks == 1 else f"{a.first_task} to {a.first_task + a.num_tasks - 1}"
        found.append(numbers if name is None else f"{name!r} ({numbers})")
    return ", ".join(found) or "none"


def pop_rows(bank: Bank, kwargs: dict[str, Any]) -> Rows:
    """The tasks of the rows of a call."""
    refuse_context_parallelism()
    refuse_cut_batch(kwargs)
    _refuse_choices(bank, kwargs)
    task_ids = kwargs.pop(TASK_IDS, None)
    if task_ids is not None:
        what = "rows" if kwargs.get("cu_seq_lens_q") is None else "packed sequences"
        hint = partial(_packing_hint, kwargs)
        return parse_task_ids(task_ids, batch_rows(kwargs), partial(find_task, bank), what, hint=hint)
    task_ids = generated_tasks(bank.patch)  # before the cache's, which have to be the same
    if task_ids is not None:
        return parse_task_ids(task_ids, batch_rows(kwargs), partial(find_task, bank), is_expanded=True)
    label = get_label(cache_argument(kwargs))
    rows = None if label is None else _rows_here(bank, label.rows)
    if rows is not None:
        return rows
    return Rows([] if (task := task_of_all(bank)) is None else [task])


def task_of_all(bank: Bank) -> Task | None:
    """The task of rows that name none; None: nothing is attached.

    Raises:
        ValueError: there are several.
    """
    # A bank of many may have one just now; a wrapper that loses task_ids must not be taken for a call without.
    if len(bank.adapters) > 1 or bank.stays or any(a.num_tasks > 1 for a in list(bank.adapters.values())):
        raise ValueError(
            f"several tasks are attached: say which one each row is for, task_ids=[...], one a row (with -1 or "
            f"None for none), or one for all; there are {_described(bank)}. A column task_ids of a dataset holds "
            "numbers: Trainer's collator leaves texts out (PackedCollator does not)"
        )
    return next((Task(adapter) for adapter in bank.adapters.values()), None)


def _refuse_choices(bank: Bank, kwargs: dict[str, Any]) -> None:
    """Raises NotImplementedError for choices [B, C, T] that a model with two heads reads as they are."""
    ids = kwargs.get("input_ids")
    if "mc_token_ids" in bank.names[bank.model] and isinstance(ids, Tensor) and ids.dim() > 2:
        raise NotImplementedError(
            f"{type(bank.model).__name__} got choices {list(ids.shape)}, and virtual tokens are for rows [B, T]: give "
            "each choice as a row, input_ids.flatten(0, 1) and mc_token_ids.flatten(), and the others so too"
        )


def _rows_here(bank: Bank, rows: Rows) -> Rows | None:
    """The rows of a cache, perhaps of a model that this one is a copy of; None: something else is attached here."""
    here = {adapter.uid: adapter for adapter in list(bank.adapters.values())}
    if any(task.adapter.uid not in here for task in rows.tasks):
        return None
    return Rows([Task(here[task.adapter.uid], task.number) for task in rows.tasks], rows.index)


def _packing_hint(kwargs: dict[str, Any]) -> str:
    """What to do where sequences are packed, but only positions say so."""
    positions = kwargs.get("position_ids")
    if not isinstance(positions, Tensor) or kwargs.get("cu_seq_lens_q") is not None or torch.compiler.is_compiling():
        return ""
    if positions.shape[-1] < 2 or not restarts(positions):
        return ""
    return (
        ": position_ids restart within a row (a packed batch), but there is no cu_seq_lens_q that says where each "
        "sequence begins, which one task a sequence needs (PackedCollator gives it)"
    )
