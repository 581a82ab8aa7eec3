"""What is attached to a model: a bank of adapters, of which each row of a batch sees its own, or none.

Also where there is one adapter, which then is every row's.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ..ops import which_backend
from .attention import ATTENTION, PREFIXES
from .cache import CacheLabel, cache_argument, cache_output, close_cache, get_label, open_cache, set_label
from .disabled import OTHER_ATTENTION, disable, is_disabled, other_attention
from .discover import AttentionCall, check_reached
from .families import has_windows, known_families, position_limit, text_config
from .layout import Layout
from .packing import is_empty_mask, set_empty_mask
from .patch import ATTACHMENT, Patch
from .positions import (
    argument_names,
    as_keywords,
    batch_rows,
    past_length,
    query_length,
    shift_positions,
    takes_keywords,
)
from .prefix import KeyValue, LayerPrefixes, PrefixCall, stack
from .refusals import (
    refuse_attention_weights,
    refuse_other_attention,
    refuse_reentrant_checkpointing,
    refuse_unshareable,
    warn_of_dropout,
)
from .residency import Residency
from .soft_prompt import (
    Prompts,
    check_arguments,
    check_positions,
    continue_after,
    insert,
    insert_each,
    insert_shared,
    is_inserted,
    tokens,
    without_prompt,
)
from .tasks import TASK_IDS, Key, Rows, Task, generated_tasks, generating, parse_task_ids

ROWS = "prefixcore_rows"
"""The argument by which a model's call hands the rows' tasks, a `RowPrefixes`, to the decoder inside."""


class Attached:
    """One adapter on a model.

    Attributes:
        name: its name in a bank of several; None: it is the only one.
        module: makes the virtual tokens: a `Prefix`, a `SoftPrompt`, or a module of the same interface.
        layers: of a prefix, the attention layers that have it, by their place in the model.
        first_task: the number of its first task.
        num_tasks: how many it has; one, but for multitask prompt tuning.
        uid: what tells it from all others; a copy of the model keeps it.
        handle: the `Handle` that the user holds.
        is_kept: whether its values stay on the model's device; else `Bank.residency` brings them there.
    """

    def __init__(self, module: Any, layers: Sequence[int] | None = None, name: str | None = None) -> None:
        self.module = module
        self.layers = None if layers is None else list(layers)
        self.name, self.first_task = name, 0
        self.num_tasks = getattr(module, "num_tasks", None) or 1
        self.uid = uuid.uuid4().hex
        self.handle: Any = None
        self.is_kept = True

    @property
    def is_prefix(self) -> bool:
        """Whether its virtual tokens are keys and values; else embeddings."""
        return self.layers is not None

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        return self.module.num_virtual_tokens

    @property
    def trains(self) -> bool:
        """Whether something of it gets a gradient in a forward that records them."""
        return any(parameter.requires_grad for parameter in self.module.parameters())


class RowPrefixes:
    """What a model's call hands to the decoder inside.

    Attributes:
        rows: the tasks of the rows.
        computed: the prefixes that soft prompts have been turned into.
    """

    __slots__ = ("rows", "computed")

    def __init__(self, rows: Rows, computed: dict[Task, LayerPrefixes | None]) -> None:
        self.rows, self.computed = rows, computed

    @property
    def tasks(self) -> list[Task]:
        """The tasks that rows see as a prefix, in the order of the stack."""
        return [task for task in self.rows.tasks if task.adapter.is_prefix or task in self.computed]

    def length(self, task: Task) -> int:
        """How many virtual tokens of a task are in its prefix."""
        layers = self.computed.get(task)
        first = None if layers is None else layers[0]
        return task.num_virtual_tokens if first is None else first[0].shape[1]


class Bank:
    """The adapters on a model, and the calls of the model that they take part in.

    Args:
        model: the model as the user knows it.

    Attributes:
        model: the model.
        adapters: what is attached, by name; under None the only one.
        limit: positions that the model has learned; None: it computes them.
        patch: what was changed in the model, to be put back.
        decoder: the text decoder inside that holds the attention layers; or why there is none that virtual tokens
            reach, in words.
        calls: its attention layers.
        residency: the copies of frozen adapters on the model's device.
        stays: whether the bank stays on the model when nothing is attached any longer.
        is_reached: whether the decoder's attention is ours. A soft prompt switches it when a call first needs that.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.adapters: dict[str | None, Attached] = {}
        self.limit = position_limit(model)
        self.patch = Patch(model)
        self.decoder: PreTrainedModel | str = "it is not known"
        self.layers: list[nn.Module] = []
        self.is_reached = False
        self.residency = Residency()
        self.stays = False
        self._next_task = 0
        self._names = {module: argument_names(module) for module in {model, model.base_model}}
        self._checkpointable = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self._only_full_attention = _only_full_attention(model)
        try:
            self.patch.freeze()
            self.patch.wrap_forward(model, self.call_model)
            if model.base_model is not model:
                self.patch.wrap_forward(model.base_model, self.call_base_model)
            self.patch.wrap_generate(self.call_generate)
            setattr(model, ATTACHMENT, self)
        except BaseException:
            self.patch.undo()
            raise

    # -- what is attached

    def set_decoder(self, decoder: PreTrainedModel | str, calls: Sequence[AttentionCall]) -> None:
        """Says where the attention layers are, or why they cannot be reached."""
        self.decoder, self.layers = decoder, [call.module for call in calls]

    def reach(self) -> None:
        """Lets the decoder's attention run through ours, once."""
        if self.is_reached or isinstance(self.decoder, str):
            return
        decoder = self.decoder
        if not takes_keywords(decoder):
            raise NotImplementedError(
                f"{type(decoder).__name__} hands no arguments of its call on to its attention layers, which prefixes "
                f"need; known families: {known_families()}"
            )
        self.patch.set_attention(decoder, ATTENTION)
        check_reached(decoder, self.layers)
        self.patch.number_layers(self.layers)
        if decoder not in self.patch.forwards:
            self._names[decoder] = argument_names(decoder)
            self.patch.wrap_forward(decoder, self.call_decoder)
        self.is_reached = True

    def add(self, adapter: Attached) -> Attached:
        """Attaches an adapter."""
        adapter.first_task, self._next_task = self._next_task, self._next_task + adapter.num_tasks
        try:
            if adapter.is_prefix:
                self.reach()
            if adapter.is_kept:
                self.patch.add_module(adapter.module, adapter.name)
        except BaseException:
            if not self.adapters and not self.stays:
                self.patch.undo()
            raise
        self.adapters[adapter.name] = adapter
        return adapter

    def remove(self, adapter: Attached) -> None:
        """Detaches an adapter; with the last one the model is put back to what it was, unless the bank stays."""
        if self.adapters.get(adapter.name) is adapter:
            del self.adapters[adapter.name]
            self.patch.remove_module(adapter.name)
            self.residency.drop(adapter.uid)
        if not self.adapters and not self.stays:
            self.patch.undo()

    @property
    def is_disabled(self) -> bool:
        """Whether the running thread computes as if nothing were attached."""
        return is_disabled(self.patch)

    def disabled(self) -> AbstractContextManager[None]:
        """Inside, the running thread computes as if nothing were attached, with the attention that the model had."""
        return disable(self.patch)

    def find_task(self, task_id: Any) -> Task | None:
        """The task of a number, a name or a pair of a name and a number; None and -1: none.

        Raises:
            ValueError, TypeError: nothing of this name or number is attached.
        """
        if task_id is None or task_id == -1:
            return None
        name, index = task_id if isinstance(task_id, tuple) else (task_id, 0)
        if isinstance(name, str) and name in self.adapters and 0 <= index < self.adapters[name].num_tasks:
            return Task(self.adapters[name], index)
        if isinstance(name, int) and not isinstance(name, bool):
            for adapter in self.adapters.values():
                if adapter.first_task <= name < adapter.first_task + adapter.num_tasks:
                    return Task(adapter, name - adapter.first_task)
        raise ValueError(f"task_ids: {task_id!r} is not attached; there are {self._described()}, and -1 or None")

    def _described(self) -> str:
        found = []
        for name, a in self.adapters.items():
            numbers = str(a.first_task) if a.num_tasks == 1 else f"{a.first_task} to {a.first_task + a.num_tasks - 1}"
            found.append(numbers if name is None else f"{name!r} ({numbers})")
        return ", ".join(found) or "none"

    # -- calls

    def call_model(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the model."""
        if self.is_disabled:
            return self._call_bare(self.model, forward, args, kwargs)
        kwargs = as_keywords(self._names[self.model], args, kwargs)
        explicit = kwargs.get(TASK_IDS) is not None or generated_tasks(self.patch) is not None
        rows = self._pop_rows(kwargs)
        if self.model is self.decoder:
            forward = partial(self._decode, forward)
        computed: dict[Task, LayerPrefixes | None] = {}
        prompts: dict[Task, Tensor] = {}
        if rows.prompts:
            computed, prompts = self._place_prompts(kwargs, rows)
        if computed or explicit or len(self.adapters) > 1:
            kwargs[ROWS] = RowPrefixes(rows, computed)
        return self._call_with_prompts(forward, kwargs, rows, prompts) if prompts else forward(**kwargs)

    def call_generate(self, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the model's generate: its rows' tasks are those of all calls of the model inside.

        They do not travel with the arguments, which generate hands on to an assistant model too.
        """
        task_ids = kwargs.pop(TASK_IDS, None)
        with generating(self.patch, task_ids):
            return generate(*args, **kwargs)

    def call_base_model(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the model without its head, from the model or by itself."""
        base: Any = self.model.base_model
        if self.is_disabled:
            return self._call_bare(base, forward, args, kwargs)
        kwargs = as_keywords(self._names[base], args, kwargs)
        if base is self.decoder:
            return self._decode(forward, **kwargs)
        self._check_inserted(base, kwargs)
        return forward(**kwargs)

    def call_decoder(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the decoder, from the model or by itself."""
        assert isinstance(self.decoder, PreTrainedModel)
        if self.is_disabled:
            return self._call_bare(self.decoder, forward, args, kwargs)
        return self._decode(forward, **as_keywords(self._names[self.decoder], args, kwargs))

    def _call_bare(
        self, module: PreTrainedModel, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A disabled call of `module`: the decoder gets the attention to use, where ours was put in."""
        kwargs.pop(TASK_IDS, None)
        name = other_attention(module.config) if module is self.decoder and self.is_reached else None
        if name is not None and module.config._attn_implementation == ATTENTION:
            kwargs[OTHER_ATTENTION] = name
        return forward(*args, **kwargs)

    def _pop_rows(self, kwargs: dict[str, Any]) -> Rows:
        """The tasks of the rows of a call."""
        task_ids = kwargs.pop(TASK_IDS, None)
        if task_ids is not None:
            what = "rows" if kwargs.get("cu_seq_lens_q") is None else "packed sequences"
            return parse_task_ids(task_ids, batch_rows(kwargs), self.find_task, what)
        label = get_label(cache_argument(kwargs))
        rows = None if label is None else self._rows_here(label.rows)
        if rows is not None:
            return rows
        task_ids = generated_tasks(self.patch)
        if task_ids is not None:
            return parse_task_ids(task_ids, batch_rows(kwargs), self.find_task)
        if len(self.adapters) > 1 or any(adapter.num_tasks > 1 for adapter in self.adapters.values()):
            raise ValueError(
                f"several tasks are attached: say which one each row is for, task_ids=[...], one a row (with -1 or "
                f"None for none), or one for all; there are {self._described()}"
            )
        return Rows([Task(adapter) for adapter in self.adapters.values()])

    def _rows_here(self, rows: Rows) -> Rows | None:
        """The rows of a cache, perhaps of a model that this one is a copy of; None: something else is attached here."""
        here = {adapter.uid: adapter for adapter in self.adapters.values()}
        if any(task.adapter.uid not in here for task in rows.tasks):
            return None
        return Rows([Task(here[task.adapter.uid], task.number) for task in rows.tasks], rows.index)

    def _decode(self, forward: Callable[..., Any], **kwargs: Any) -> Any:
        """A call of the decoder, whose layers get their prefixes."""
        decoder: Any = self.decoder
        given: RowPrefixes | None = kwargs.pop(ROWS, None)
        from_model = given is not None
        if given is None:
            self._check_inserted(decoder, kwargs)
            given = RowPrefixes(self._pop_rows(kwargs), {})
        if not self.is_reached:
            return forward(**kwargs)
        refuse_other_attention(decoder)
        tasks = given.tasks
        if given.rows.tasks:
            refuse_attention_weights(decoder, kwargs)
        if tasks and decoder.training and torch.is_grad_enabled():
            refuse_reentrant_checkpointing(self._checkpointable)
        num_rows, cache = batch_rows(kwargs), cache_argument(kwargs)
        keys = given.rows.keys(num_rows)
        label = self._label_to_continue(cache, keys)
        call = self._prefixes_of_call(given, tasks, num_rows, label, tokens(kwargs).device)
        if kwargs.get("cu_seq_lens_q") is not None and not is_empty_mask(kwargs.get("attention_mask")):
            set_empty_mask(kwargs)
        if tasks or from_model:
            lengths = label.order if label is not None else {task.key: given.length(task) for task in tasks}
            counts = [lengths.get(key, 0) if key else 0 for key in keys]
            shift_positions(kwargs, self._shift(counts, kwargs), self.limit)
        open_cache(cache)
        try:
            output = forward(**kwargs, **{PREFIXES: call})
        finally:
            close_cache(cache)
        cache = cache_output(output) if cache is None else cache
        if label is None and tasks and isinstance(cache, Cache) and kwargs.get("cu_seq_lens_q") is None:
            set_label(cache, CacheLabel(keys, given.rows, lengths, call.detached(), [0] * num_rows))
            close_cache(cache)
        return output

    def _shift(self, counts: list[int], kwargs: dict[str, Any]) -> int | Tensor:
        """By how much the positions of each row move: one number for all, or [B, 1], packed [1, T]."""
        if len(set(counts)) <= 1:
            return counts[0] if counts else 0
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        device = tokens(kwargs).device
        shift = torch.tensor(counts, device=device)
        return shift[:, None] if cu_seqlens is None else shift.repeat_interleave(cu_seqlens.diff().to(device))[None]

    def _label_to_continue(self, cache: Any, keys: list[Key | None]) -> CacheLabel | None:
        """The label of a cache that the call goes on from; None: the call starts a sequence.

        Raises:
            ValueError: the cache was filled behind other virtual tokens than the rows', or behind none.
        """
        if cache is None:
            return None
        label, past = get_label(cache), cache.get_seq_length()
        if label is not None and not (isinstance(past, int) and past == 0):
            if not label.fits(keys):
                raise ValueError(
                    "the cache was filled behind other virtual tokens than those of the rows that go on from it: give "
                    "each row the task that it began with, or start a new cache"
                )
            return label
        if torch.compiler.is_compiling():  # cannot read how much a static cache holds
            return None
        if label is not None:
            set_label(cache, None)
        elif any(key is not None for key in keys) and int(past) > 0:
            raise ValueError(
                f"the cache holds {int(past)} tokens that were computed without these virtual tokens (before they were "
                "attached, while they were disabled, or by another model): start a new cache, or detach"
            )
        return None

    def _prefixes_of_call(
        self, given: RowPrefixes, tasks: list[Task], num_rows: int, label: CacheLabel | None, device: torch.device
    ) -> PrefixCall:
        """The prefixes that the call's layers see; those of the cache, where it holds a sequence behind them.

        Evaluated anew for each sequence, so that a change of the parameters by whatever means is seen.
        """
        if not tasks:
            return PrefixCall([])
        trains = torch.is_grad_enabled() and any(task.adapter.trains for task in tasks)
        if label is not None and label.prefixes is not None and not trains:
            return label.prefixes_for(given.rows.keys(num_rows))
        prefixes = [given.computed.get(task) or self._prefix_of(task) for task in tasks]
        index = given.rows.of(tasks, num_rows)
        if len(tasks) == 1 and min(index, default=0) >= 0:
            return PrefixCall(prefixes[0])
        return stack(prefixes, index, device)

    def _prefix_of(self, task: Task) -> LayerPrefixes:
        """The keys and values of a task: differentiable where it trains and gradients are recorded."""
        adapter = task.adapter
        if adapter.layers is None:  # a soft prompt whose sequence goes on from a cache, now with gradients
            return self._compute_once(self._prompt_of(task))
        by_layer: LayerPrefixes = [None] * len(self.layers)
        for layer, pair in zip(adapter.layers, self._evaluate(adapter), strict=True):
            by_layer[layer] = pair
        return by_layer

    def _evaluate(self, adapter: Attached) -> Any:
        """What the module makes, without a graph where none is wanted."""
        if torch.is_grad_enabled() and adapter.trains:
            return adapter.module()
        if torch.compiler.is_compiling():
            return _detach(adapter.module())
        with torch.inference_mode(False), torch.no_grad():  # a later forward may need them in a graph
            values = _detach(adapter.module())
            return values if adapter.is_kept else self.residency.get(adapter.uid, values, self.model.device)

    # -- soft prompts

    def _prompt_of(self, task: Task) -> Tensor:
        """The embeddings [P, E] of a task."""
        values = self._evaluate(task.adapter)
        return values[task.number] if values.dim() == 3 else values

    def _place_prompts(
        self, kwargs: dict[str, Any], rows: Rows
    ) -> tuple[dict[Task, LayerPrefixes | None], dict[Task, Tensor]]:
        """Which soft prompts of a call become prefixes, computed once for all rows, and what is put into each row.

        The model is causal, so the virtual tokens of a soft prompt do not depend on the text, and are to it what a
        prefix is. The cache then holds the text alone. With labels the last virtual token goes into each row, as the
        first token of the text is predicted from it.

        Returns:
            The prefixes, None for one that the cache holds; and the embeddings [P, E] of what is put in.
        """
        cache = cache_argument(kwargs)
        label = None
        if kwargs.get("cu_seq_lens_q") is None:
            label = self._label_to_continue(cache, rows.keys(batch_rows(kwargs)))
        if label is not None:
            inserted = dict.fromkeys(rows.prompts, cache) if any(label.inserted) else {}
            return {task: None for task in rows.prompts if task.key in label.order}, inserted
        prompts = {task: self._prompt_of(task) for task in rows.prompts}
        trains = torch.is_grad_enabled() and any(task.adapter.trains for task in rows.prompts)
        if not self._may_compute_once(kwargs, max(map(len, prompts.values())), trains):
            return {}, prompts
        if not self.is_reached and trains:
            warn_of_dropout(self.model)
        self.reach()
        assert isinstance(self.decoder, PreTrainedModel)
        refuse_other_attention(self.decoder)
        last = 0 if kwargs.get("labels") is None else 1
        shared = {task: prompt[: len(prompt) - last] for task, prompt in prompts.items() if len(prompt) > last}
        inserted = {task: prompt[len(prompt) - last :] for task, prompt in prompts.items()} if last else {}
        return {task: self._compute_once(prompt) for task, prompt in shared.items()}, inserted

    def _may_compute_once(self, kwargs: dict[str, Any], longest: int, trains: bool) -> bool:
        """Whether soft prompts of a call that starts sequences can be computed once, and it is worth it."""
        decoder = self.decoder
        if isinstance(decoder, str) or not self._only_full_attention or torch.compiler.is_compiling():
            return False
        if kwargs.get("cu_seq_lens_q") is not None or kwargs.get("token_type_ids") is not None:
            return False  # a packed batch does it in one pass; types of tokens come from each row's text
        for option in ("output_attentions", "output_router_logits"):
            if kwargs.get(option) or getattr(decoder.config, option, False):
                return False
        saved = (batch_rows(kwargs) - 1) * longest
        if trains:
            # Repeated layers would leave their keys a second time. On a GPU a second pass costs its launches.
            checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in self._checkpointable)
            if checkpointing or saved < (1 if tokens(kwargs).device.type == "cpu" else 1024):
                return False
        elif saved == 0 and not _uses_cache(self.model, kwargs):
            return False
        return _start_at_zero(kwargs)

    def _compute_once(self, prompt: Tensor) -> LayerPrefixes:
        """The keys and values that the layers compute for a soft prompt [P, E] at positions 0 to P-1."""
        decoder: Any = self.decoder
        embed: Any = self.model.get_input_embeddings()
        prompt = prompt.to(device=embed.weight.device, dtype=embed.weight.dtype)
        recorded: dict[int, KeyValue] = {}
        forward = self.patch.forwards[decoder].original
        forward(inputs_embeds=prompt[None], use_cache=False, **{PREFIXES: PrefixCall([], recorded=recorded)})
        return [_of_one_dtype(*recorded[layer]) for layer in range(len(self.layers))]

    def _call_with_prompts(
        self, forward: Callable[..., Any], kwargs: dict[str, Any], rows: Rows, prompts: dict[Task, Tensor]
    ) -> Any:
        """A call of the model with soft prompts put into its input, and taken out of its output."""
        check_arguments(kwargs)
        cache, num_rows, packed = cache_argument(kwargs), batch_rows(kwargs), kwargs.get("cu_seq_lens_q") is not None
        if self.is_reached:
            assert isinstance(self.decoder, PreTrainedModel)
            refuse_attention_weights(self.decoder, kwargs)
        past, length = past_length(kwargs), tokens(kwargs).shape[1]
        label = None if packed else self._label_to_continue(cache, rows.keys(num_rows))
        layout: Any = None
        if label is not None or (past and not packed):
            counts = rows.counts(list(prompts), num_rows) if label is None else label.inserted_of(num_rows)
            continue_after(kwargs, counts, past, _may_read(kwargs, cache))
            needed = int(past) + length
        else:
            placed = Prompts(list(prompts.values()), rows.of(list(prompts), num_rows))
            counts = placed.counts
            if packed:
                layout = self._insert_packed(kwargs, rows, placed, int(past))
            else:
                layout = insert(self.model, self._names[self.model], kwargs, placed)
            needed = placed.longest + length
        check_positions(kwargs, max(counts), needed, self.limit)
        open_cache(cache)
        try:
            output = forward(**kwargs)
            if layout is None:
                return output
            cache = cache_output(output) if cache is None else cache
            if isinstance(cache, Cache) and not packed and not torch.compiler.is_compiling():
                set_label(cache, CacheLabel.inserting(get_label(cache), rows.keys(num_rows), rows, counts))
            return without_prompt(output, layout)
        finally:
            close_cache(cache)

    def _insert_packed(self, kwargs: dict[str, Any], rows: Rows, prompts: Prompts, past: int) -> Any:
        """Puts the soft prompts into a packed batch: one before all sequences, or each before its own."""
        batch_size = tokens(kwargs).shape[0]
        if batch_size != 1 or past:
            got = f"{batch_size} rows" if batch_size != 1 else f"a cache of {past} tokens"
            raise ValueError(f"expected one row and an empty cache in a packed batch (cu_seq_lens_q), got {got}")
        decoder = self.decoder
        if isinstance(decoder, str):
            raise NotImplementedError(
                f"{type(self.model).__name__} cannot be given packed batches (cu_seq_lens_q) with a soft prompt: "
                f"{decoder}; pad the sequences into rows of their own"
            )
        refuse_attention_weights(decoder, kwargs)
        if not self.is_reached and any(task.adapter.trains for task in rows.prompts):
            warn_of_dropout(self.model)
        self.reach()
        refuse_other_attention(decoder)
        if not prompts.is_one:
            return insert_each(self.model, kwargs, prompts)
        refuse_unshareable(decoder, kwargs)
        if has_windows(decoder) and prompts.index:  # read once here, and not in each layer: it makes a GPU wait
            kwargs["max_length_q"] = int(kwargs["cu_seq_lens_q"].diff().max())
        return insert_shared(self.model, kwargs, prompts)

    @property
    def can_pack(self) -> bool:
        """Whether packed batches can be given with a soft prompt, and attention has a kernel for them.

        The model keeps its own attention until the first packed batch, so its dtype and device may still change.
        """
        if isinstance(self.decoder, str):
            return False
        try:
            choice = which_backend("prefix_attention", self.decoder.device, self.decoder.dtype)
        except (ValueError, RuntimeError):  # a backend is forced that has no attention, or nothing is compiled
            return False
        return choice.name != "reference" or choice.why == "forced"

    def _check_inserted(self, module: PreTrainedModel, kwargs: dict[str, Any]) -> None:
        """Raises RuntimeError in a call that starts a sequence of `module` by itself, without its soft prompt."""
        if ROWS in kwargs or torch.compiler.is_compiling() or is_inserted(kwargs.get("inputs_embeds")):
            return
        cache = cache_argument(kwargs)
        if all(a.is_prefix for a in self.adapters.values()) or get_label(cache) is not None:
            return
        raise RuntimeError(
            f"{type(module).__name__} was called without the soft prompt, which is put in when the model that it is "
            f"attached to ({type(self.model).__name__}) is called"
        )


def _of_one_dtype(key: Tensor, value: Tensor) -> KeyValue:
    """They differ under autocast: rotation is in float32."""
    dtype = torch.promote_types(key.dtype, value.dtype)
    return key.to(dtype), value.to(dtype)


def _detach(values: Any) -> Any:
    return values.detach() if isinstance(values, Tensor) else [(key.detach(), value.detach()) for key, value in values]


def _only_full_attention(model: PreTrainedModel) -> bool:
    """Whether every layer lets each token see all that come before it."""
    layer_types = getattr(text_config(model), "layer_types", None) or []
    return not has_windows(model) and set(layer_types) <= {"full_attention"}


def _start_at_zero(kwargs: dict[str, Any]) -> bool:
    """Whether each text begins at position 0; the prompt stands before it wherever that is."""
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is None:
        return True
    if positions.dim() != 2:
        return False
    length = tokens(kwargs).shape[1]
    if mask is None:
        return not bool(positions[:, 0].any()) and not bool((positions.diff(dim=-1) < 0).any())
    if not isinstance(mask, Tensor) or mask.dim() != 2:  # made by generate for a static cache, as the positions were
        return not bool(positions.amin(-1).any())
    positions = positions.expand(mask.shape[0], -1)
    return not bool(Layout.from_mask(mask, mask.shape[0], length, 0).first_of_text(positions).any())


def _uses_cache(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    use_cache = kwargs.get("use_cache")
    return cache_argument(kwargs) is not None or bool(text_config(model).use_cache if use_cache is None else use_cache)


def _may_read(kwargs: dict[str, Any], cache: Any) -> bool:
    """Whether to read the values of positions, which makes a GPU wait: not in each step of a plain generate."""
    on_cpu = tokens(kwargs).device.type == "cpu"
    return on_cpu or query_length(kwargs) > 1 or getattr(cache, "_is_user_defined", False)
