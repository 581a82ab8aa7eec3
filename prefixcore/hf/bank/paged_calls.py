"""Continuous batching of an attached model: the managers that transformers makes, and their requests."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from ..paged.bare_copy import KEPT, bare_copy, state_of
from ..paged.ids import VirtualIds, WithVirtual
from ..positions.model_inputs import reads_ids, stand_in
from ..positions.positions import check_limit
from ..positions.rotary import turn
from .paged_refusals import check_attention, check_paged
from .prefix_calls import prefix_of, prompt_of
from .rows import find_task, task_of_all

if TYPE_CHECKING:
    from .bank import Bank

TASK_ID = "task_id"
"""The argument of `add_request` that says whose virtual tokens stand before its text."""

_STARTED = (
    "continuous batching was started, which goes on with what was there, as it keeps pages of it: stop it, and start "
    "it anew"
)


class PagedBatching:
    """What is attached to a model, ready for the requests of one manager: as it is when this is made.

    Args:
        bank: what is attached.
        tasks: those that requests may name.

    Attributes:
        model: a copy of the model, with the same weights and nothing attached, of which no other manager sets the
            attention.
        ids: the ids of the virtual tokens.
        sees: whether what is attached was seen by the thread that made it.
    """

    def __init__(self, bank: Bank, tasks: Sequence[Task]) -> None:
        self.bank, self.sees = bank, not bank.is_disabled
        check_paged(bank, tasks)
        with torch.no_grad(), _without_dropout(tasks):
            prompts: dict[Task, Tensor] = {t: prompt_of(bank, t) for t in tasks if not t.adapter.is_prefix}
            prefixes: dict[Task, LayerPrefixes] = {t: _before_text(bank, t) for t in tasks if t.adapter.is_prefix}
        self.model: PreTrainedModel = bare_copy(bank.model)
        like = stand_in(bank.model) if reads_ids(bank.model) else None
        self.ids = VirtualIds(self.model.get_input_embeddings(), bank.layers, prompts, prefixes, like)
        WrappedMethod(self.model, "forward", self.ids.call)
        WrappedMethod(self.model, "init_continuous_batching", self._start)
        self._state = state_of(bank.model)
        self._values = {task.adapter.uid: _copies(task) for task in tasks}

    def _start(self, start: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        manager = start(*args, **kwargs)
        check_attention(manager.model)
        if TASK_ID not in inspect.signature(manager.add_request).parameters:  # else it is one kept from before
            _take_tasks(manager, self)
        return manager

    def is_current(self, tasks: Sequence[Task]) -> bool:
        """Whether `tasks`, and the model, are what they were."""
        return all(self._is_unchanged(task) for task in tasks) and self._state == state_of(self.bank.model)

    def _is_unchanged(self, task: Task) -> bool:
        before, now = self._values.get(task.adapter.uid), task.adapter.values()
        return before is not None and _are_equal(before, now)

    def check(self, tasks: Sequence[Task | None]) -> None:
        """Raises RuntimeError where what `tasks` name is no longer what it was."""
        if not self.bank.is_attached:
            raise RuntimeError(f"what was attached to the model has been detached since {_STARTED}")
        for task in dict.fromkeys(tasks):
            if task is not None and not self._is_unchanged(task):
                raise RuntimeError(f"{_named(task)} was attached or changed after {_STARTED}")

    def request(self, task: Task | None, ids: Any, max_new_tokens: int | None) -> WithVirtual:
        """The ids of a request, with its virtual tokens before its text.

        Raises:
            ValueError: the ids are no ids of the vocabulary, or are too many behind virtual tokens.
        """
        ids = self.ids.text(ids)
        if task is None:
            return self.ids.before(None, ids)
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
    model: Any = prepare(bank, _attached(bank)).model
    return model.init_continuous_batching(*args, **kwargs)


def generate_batch(
    bank: Bank, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """`model.generate_batch` of an attached model: its requests are checked before anything is started."""
    task_ids = kwargs.pop(TASK_IDS, None)
    bound = inspect.signature(generate).bind(*args, **kwargs)
    given, inputs = bound.arguments, bound.arguments["inputs"]
    tasks = _tasks(bank, not bank.is_disabled, task_ids, len(inputs))
    named = list(dict.fromkeys(task for task in tasks if task is not None))
    paged = prepare(bank, _attached(bank) if given.get("persistent_manager") else named)
    paged.check(tasks)
    most = given.get("kwargs", {}).get("max_new_tokens")
    if most is None:
        most = (given.get("generation_config") or bank.model.generation_config).max_new_tokens
    given["inputs"] = [paged.request(task, ids, most) for task, ids in zip(tasks, inputs, strict=True)]
    model: Any = paged.model
    return model.generate_batch(*bound.args, **bound.kwargs)


def prepare(bank: Bank, tasks: Sequence[Task]) -> PagedBatching:
    """What is attached, as it is now: anew, but for that of a manager that was kept for a next session."""
    kept = bank.paged
    if kept is None or kept.sees == bank.is_disabled or not kept.is_current(tasks):
        end(bank)
        return PagedBatching(bank, tasks)
    kept.model.generation_config = bank.model.generation_config
    return kept


def end(bank: Bank) -> None:
    """Lets go of a manager that was kept for a next session."""
    paged, bank.paged = bank.paged, None
    if paged is not None:
        model: Any = paged.model
        model.destroy_cached_continuous_batching_manager()


def _attached(bank: Bank) -> list[Task]:
    """The tasks that are attached, and seen by the running thread."""
    if bank.is_disabled:
        return []
    return [Task(adapter, i) for adapter in list(bank.adapters.values()) for i in range(adapter.num_tasks)]


def _tasks(bank: Bank, sees: bool, task_ids: Any, count: int) -> list[Task | None]:
    """Of each request its task; none where nothing is seen, by the call or by the running thread."""
    if not sees or is_disabled(bank.patch):
        return [None] * count
    if task_ids is None:
        return [task_of_all(bank)] * count
    rows = parse_task_ids(task_ids, count, partial(find_task, bank), "requests")
    if rows.index is None:
        return [rows.tasks[0] if rows.tasks else None] * count
    return [None if i < 0 else rows.tasks[i] for i in rows.index]


def _take_tasks(manager: Any, paged: PagedBatching) -> None:
    """Lets a manager take `task_id` for a request and `task_ids` for several, and give back texts alone."""
    add_one, add_several, stop, router = manager.add_request, manager.add_requests, manager.stop, manager.output_router
    one, several = inspect.signature(add_one), inspect.signature(add_several)

    def with_virtual(inputs: Any, task_ids: Any, given: dict[str, Any]) -> list[WithVirtual]:
        if all(isinstance(ids, WithVirtual) for ids in inputs):
            return list(inputs)
        tasks, most = _tasks(paged.bank, paged.sees, task_ids, len(inputs)), given.get("max_new_tokens")
        paged.check(tasks)
        most = manager.generation_config.max_new_tokens if most is None else most
        return [paged.request(task, ids, most) for task, ids in zip(tasks, inputs, strict=True)]

    def add_request(*args: Any, task_id: Any = None, **kwargs: Any) -> Any:
        bound = one.bind(*args, **kwargs)
        task_ids = None if task_id is None else [task_id]
        (bound.arguments["input_ids"],) = with_virtual([bound.arguments["input_ids"]], task_ids, bound.arguments)
        return add_one(*bound.args, **bound.kwargs)

    def add_requests(*args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        bound = several.bind(*args, **kwargs)
        bound.arguments["inputs"] = with_virtual(bound.arguments["inputs"], task_ids, bound.arguments)
        return add_several(*bound.args, **bound.kwargs)

    def stop_or_keep(*args: Any, **kwargs: Any) -> None:
        stop(*args, **kwargs)
        if KEPT in paged.model.__dict__ and paged.bank.is_attached:
            paged.bank.paged = paged

    def deliver(output: Any, deliver: Callable[[Any], None] = router.deliver) -> None:
        deliver(_text_alone(output, paged.ids.vocabulary))

    def deliver_batch(outputs: list[Any], deliver: Callable[[Any], None] = router.deliver_batch) -> None:
        deliver([_text_alone(output, paged.ids.vocabulary) for output in outputs])

    manager.add_request, manager.add_requests, manager.stop = add_request, add_requests, stop_or_keep
    router.deliver, router.deliver_batch = deliver, deliver_batch


def _text_alone(output: Any, vocabulary: int) -> Any:
    """What a request has come to, without the ids of its virtual tokens."""
    output.prompt_ids = [i for i in output.prompt_ids if i < vocabulary]
    return output


def _before_text(bank: Bank, task: Task) -> LayerPrefixes:
    """A prefix as it stands in pages, where a text begins at position P: keys that let it begin at 0 go P further."""
    prefix, adapter = prefix_of(bank, task), task.adapter
    if adapter.shift:
        return prefix
    with bank.disabled():
        return list(turn(bank.model, [pair for pair in prefix if pair is not None], adapter.num_virtual_tokens))


@contextmanager
def _without_dropout(tasks: Sequence[Task]) -> Iterator[None]:
    """A block in which the modules of `tasks` make what they make for `generate`, also where the model is training."""
    modules = {task.adapter.module for task in tasks if task.adapter.module.training}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module in modules:
            module.train()


def _copies(task: Task) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in task.adapter.values().items()}


def _are_equal(before: dict[str, Tensor], now: dict[str, Tensor]) -> bool:
    return before.keys() == now.keys() and all(
        before[name].device == now[name].device and torch.equal(before[name], now[name]) for name in before
    )


def _named(task: Task) -> str:
    return "what is attached" if task.adapter.name is None else f"adapter {task.adapter.name!r}"
