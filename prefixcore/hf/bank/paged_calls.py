"""Continuous batching of an attached model: the managers that transformers makes, and their requests."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention.disabled import is_disabled
from ..attention.prefix import LayerPrefixes
from ..batch.tasks import TASK_IDS, Task, parse_task_ids
from ..families import text_config
from ..model.wrapped import WrappedMethod
from ..paged.bare_copy import bare_copy
from ..paged.ids import VirtualIds, WithVirtual
from ..positions.model_inputs import reads_ids, stand_in
from ..positions.positions import check_limit
from .paged_refusals import check_attention, check_paged
from .prefix_calls import prefix_of, prompt_of
from .rows import find_task, task_of_all

if TYPE_CHECKING:
    from .bank import Bank

TASK_ID = "task_id"
"""The argument of `add_request` that says whose virtual tokens stand before its text."""


class PagedBatching:
    """What is attached to a model, ready for continuous batching: as it is when this is made.

    Args:
        bank: what is attached.

    Attributes:
        model: a copy of the model, with the same weights and nothing attached.
        ids: the ids of the virtual tokens.
        sees: whether what is attached was seen by the thread that made it.
    """

    def __init__(self, bank: Bank) -> None:
        self.bank, self.sees, tasks = bank, not bank.is_disabled, _attached(bank)
        check_paged(bank, tasks)
        with torch.no_grad():
            prompts: dict[Task, Tensor] = {t: prompt_of(bank, t) for t in tasks if not t.adapter.is_prefix}
            prefixes: dict[Task, LayerPrefixes] = {t: prefix_of(bank, t) for t in tasks if t.adapter.is_prefix}
        self.model: PreTrainedModel = bare_copy(bank.model)
        like = stand_in(bank.model) if reads_ids(bank.model) else None
        self.ids = VirtualIds(self.model.get_input_embeddings(), bank.layers, prompts, prefixes, like)
        WrappedMethod(self.model, "forward", self.ids.call)
        self._parts = _parts(bank.model)
        self._values = {task.adapter.uid: _copies(task) for task in tasks}

    def is_current(self) -> bool:
        """Whether what is attached, and the model's own modules, are what they were."""
        attached = {task.adapter.uid: task for task in _attached(self.bank)}
        same = attached.keys() == self._values.keys() and self._parts == _parts(self.bank.model)
        return same and all(self._is_unchanged(task) for task in attached.values())

    def _is_unchanged(self, task: Task) -> bool:
        before, now = self._values.get(task.adapter.uid, {}), task.adapter.values()
        return before.keys() == now.keys() and all(torch.equal(before[name], now[name]) for name in before)

    def request(self, task: Task | None, ids: Any, max_new_tokens: int | None) -> WithVirtual:
        """The ids of a request, with its virtual tokens before its text.

        Raises:
            TypeError, ValueError: the ids are no ids of the vocabulary, or are too many behind virtual tokens.
            RuntimeError: the adapter is no longer what it was.
        """
        ids = ids.reshape(-1).tolist() if isinstance(ids, Tensor) else list(ids)
        wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < self.ids.vocabulary]
        if wrong:
            raise ValueError(
                f"a request: expected ids from 0 to {self.ids.vocabulary - 1}, got {wrong[0]!r}: give a list of ids, "
                "those of the text alone"
            )
        if task is None:
            return self.ids.before(None, ids)
        if task.key() not in self.ids.spans or not self._is_unchanged(task):
            raise RuntimeError(
                f"{_named(task)} was attached or changed after continuous batching was started, which goes on with "
                "what was there, as it keeps pages of it: stop it, and start it anew"
            )
        text, virtual = len(ids) + (max_new_tokens or 1) - 1, task.adapter.num_virtual_tokens
        if self.bank.limit is not None:
            check_limit(virtual + text, virtual, self.bank.limit)
        if task.adapter.is_prefix and not self.bank.only_full_attention:
            self._check_window(virtual + text, max_new_tokens)
        return self.ids.before(task, ids)

    def _check_window(self, length: int, max_new_tokens: int | None) -> None:
        window = getattr(text_config(self.bank.model), "sliding_window", None)
        if window == 0:  # there is none
            return
        if not isinstance(window, int) or max_new_tokens is None or length > window:
            raise ValueError(
                f"some layers see no further than {window} tokens, and in continuous batching a prefix leaves that "
                f"window as any token does, where generate always shows it: expected virtual tokens, text and "
                f"max_new_tokens to be at most {window} together, got {length if max_new_tokens else 'no limit'}; give "
                "fewer, or call generate"
            )


def start(bank: Bank, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`model.init_continuous_batching` of an attached model."""
    paged = prepare(bank)
    model: Any = paged.model
    manager = model.init_continuous_batching(*args, **kwargs)
    check_attention(manager.model)
    if TASK_ID not in inspect.signature(manager.add_request).parameters:  # else it is one kept from before
        _take_tasks(manager, paged)
    return manager


def generate_batch(
    bank: Bank, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """`model.generate_batch` of an attached model: its requests are checked before anything is started."""
    task_ids = kwargs.pop(TASK_IDS, None)
    bound = inspect.signature(generate).bind(*args, **kwargs)
    inputs, paged = bound.arguments["inputs"], prepare(bank)
    config = bound.arguments.get("generation_config") or bank.model.generation_config
    most = bound.arguments.get("kwargs", {}).get("max_new_tokens", config.max_new_tokens)
    tasks = _tasks(paged, task_ids, len(inputs))
    bound.arguments["inputs"] = [paged.request(t, ids, most) for t, ids in zip(tasks, inputs, strict=True)]
    return generate(*bound.args, **bound.kwargs)


def prepare(bank: Bank) -> PagedBatching:
    """What is attached, as it is now; a manager that transformers keeps for a next session stays while that is so."""
    if bank.paged is not None and not bank.paged.is_current():
        end(bank)
    if bank.paged is None:
        bank.paged = PagedBatching(bank)
    bank.paged.model.generation_config = bank.model.generation_config
    return bank.paged


def end(bank: Bank) -> None:
    """Lets go of the copy of the model, and of a manager that is kept for a next session."""
    paged, bank.paged = bank.paged, None
    if paged is not None:
        model: Any = paged.model
        model.destroy_cached_continuous_batching_manager()


def _attached(bank: Bank) -> list[Task]:
    """The tasks that are attached, and seen by the running thread."""
    if bank.is_disabled:
        return []
    return [Task(adapter, i) for adapter in list(bank.adapters.values()) for i in range(adapter.num_tasks)]


def _tasks(paged: PagedBatching, task_ids: Any, count: int) -> list[Task | None]:
    """Of each request its task."""
    bank = paged.bank
    if not paged.sees or is_disabled(bank.patch):
        return [None] * count
    if task_ids is None:
        return [task_of_all(bank)] * count
    rows = parse_task_ids(task_ids, count, partial(find_task, bank), "requests")
    if rows.index is None:
        return [rows.tasks[0] if rows.tasks else None] * count
    return [None if i < 0 else rows.tasks[i] for i in rows.index]


def _take_tasks(manager: Any, paged: PagedBatching) -> None:
    """Lets a manager take `task_id` for a request and `task_ids` for several, and give back texts alone."""
    add_one, add_several, router = manager.add_request, manager.add_requests, manager.output_router
    one, several = inspect.signature(add_one), inspect.signature(add_several)

    def most(bound: inspect.BoundArguments) -> int | None:
        given = bound.arguments.get("max_new_tokens")
        return manager.generation_config.max_new_tokens if given is None else given

    def add_request(*args: Any, task_id: Any = None, **kwargs: Any) -> Any:
        bound = one.bind(*args, **kwargs)
        ids = bound.arguments["input_ids"]
        if not isinstance(ids, WithVirtual):
            (task,) = _tasks(paged, task_id if task_id is None else [task_id], 1)
            bound.arguments["input_ids"] = paged.request(task, ids, most(bound))
        return add_one(*bound.args, **bound.kwargs)

    def add_requests(*args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        bound = several.bind(*args, **kwargs)
        inputs = bound.arguments["inputs"]
        if not all(isinstance(ids, WithVirtual) for ids in inputs):
            tasks = _tasks(paged, task_ids, len(inputs))
            requests = [paged.request(task, ids, most(bound)) for task, ids in zip(tasks, inputs, strict=True)]
            bound.arguments["inputs"] = requests
        return add_several(*bound.args, **bound.kwargs)

    def deliver(output: Any, deliver: Callable[[Any], None] = router.deliver) -> None:
        deliver(_text_alone(output, paged.ids.vocabulary))

    def deliver_batch(outputs: list[Any], deliver: Callable[[Any], None] = router.deliver_batch) -> None:
        deliver([_text_alone(output, paged.ids.vocabulary) for output in outputs])

    manager.add_request, manager.add_requests = add_request, add_requests
    router.deliver, router.deliver_batch = deliver, deliver_batch


def _text_alone(output: Any, vocabulary: int) -> Any:
    """What a request has come to, without the ids of its virtual tokens."""
    output.prompt_ids = [i for i in output.prompt_ids if i < vocabulary]
    return output


def _parts(model: PreTrainedModel) -> list[tuple[str, int]]:
    """The parameters of a model by their names: other ones are there where a part of it was replaced."""
    return [(name, id(parameter)) for name, parameter in model.named_parameters()]


def _copies(task: Task) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in task.adapter.values().items()}


def _named(task: Task) -> str:
    return "what is attached" if task.adapter.name is None else f"adapter {task.adapter.name!r}"
