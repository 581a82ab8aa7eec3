"""What is attached to a model: a bank of adapters, of which each row of a batch sees its own, or none.

Also where there is one adapter, which then is every row's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...nn import CPTPrompt
from ..attention.disabled import OTHER_ATTENTION, disable, is_disabled, other_attention
from ..attention.discover import has_other_layers, is_encoder, moves_positions
from ..attention.interface import ATTENTION
from ..attention.patch import ATTACHMENT, Patch
from ..attention.recording import AttentionCall
from ..batch.tasks import TASK_IDS, Task, generated_tasks, generating
from ..families import has_only_full_attention, is_known
from ..model.active import activate
from ..model.sharded import agree_on_values, data_meshes
from ..model.signature import argument_names, as_keywords, takes_keywords
from ..model.tensor_parallel import HeadGroup, head_group
from ..positions.decoder_positions import embed_positions, position_module
from ..positions.model_inputs import has_axes
from ..positions.position_table import first_position, position_limit
from ..positions.positions import shift_positions
from .attached import Attached
from .cpt_calls import TYPES, take_answers_loss
from .encoder_calls import encode, find_encoder
from .guidance import guide_without
from .handed import ROWS, RowPrefixes, hand_over
from .inserted import check_inserted, continues_after_prompts, lacks_prompt
from .paged_calls import PagedBatching, generate_batch
from .paged_calls import end as end_batching
from .paged_calls import start as start_batching
from .prefix_calls import decode
from .prompt_calls import (
    call_with_prompts,
    keep_new_text,
    place_prompts,
    place_prompts_in_text,
    reach_before_masks,
)
from .reach import check_concatenated, reach
from .residency import Residency
from .rows import pop_rows


class Bank:
    """The adapters on a model, and the calls of the model that they take part in.

    Args:
        model: the model as the user knows it.

    Attributes:
        model, body: the model, and the same without its head.
        adapters: what is attached, by name; under None the only one.
        limit: positions that the model has learned; None: it computes them.
        first_position: where the model places the first token of a text, which is 0 but for RoBERTa and its kind.
        moves_positions: whether a text with a prefix stands P positions further on.
        patch: what was changed in the model, to be put back.
        decoder: the text decoder inside that holds the attention layers; or why there is none that virtual tokens
            reach, in words.
        encoder: of an encoder-decoder its encoder.
        positions: the module that embeds the positions which the decoder counts, of an encoder-decoder or of one whose
            prefix is in its cache; None: there is none.
        layers: the attention layers.
        head_groups: for each the processes that share its heads; None: this one has all.
        data_meshes: the processes that FSDP2 shares the model's weights out to; none elsewhere.
        cache_layers: which attention layer has which number in the cache, where nothing else reaches them; else empty.
        cache_name: what the decoder's forward calls its cache.
        is_hybrid: whether it has other layers than attention, which remember what they have read.
        takes_positions: whether the decoder is told positions; else it counts them.
        encoder_layers, decoder_layers: of an encoder-decoder which of them are self-attention of each.
        names: the arguments of the forwards that are wrapped, by their modules.
        checkpointable: the modules that say whether gradient checkpointing is on.
        only_full_attention: whether every layer lets each token see all that come before it.
        hands_on_arguments: whether its layers get the arguments of its call.
        hands_rows_on: whether the model takes arguments that it does not know, and hands them to what is inside.
        residency: the copies of frozen adapters on the model's device.
        stays: whether the bank stays on the model when nothing is attached any longer.
        stage: of a model that is cut into stages of a pipeline, the one that this process has.
        moves_with_padding: whether padding on the left changes what the model computes; None: not tried yet.
        paged: what a manager of continuous batching runs on that was kept for a next session.
        is_reached: whether the decoder's attention is ours. A soft prompt switches it when a call first needs that.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.body = model, model.base_model
        self.adapters: dict[str | None, Attached] = {}
        self.limit = position_limit(model)
        self.first_position = first_position(model)
        self.moves_positions = True
        self.patch = Patch(model)
        self.decoder: PreTrainedModel | str = "it is not known"
        self.layers: list[nn.Module] = []
        self.head_groups: list[HeadGroup | None] = []
        self.data_meshes = data_meshes(model)
        self.encoder = find_encoder(model)
        self.positions: nn.Module | None = None
        self.encoder_layers: frozenset[int] = frozenset()
        self.decoder_layers: frozenset[int] = frozenset()
        self.cache_layers: dict[int, int] = {}
        self.is_hybrid = False
        self.cache_name, self.takes_positions = "past_key_values", True
        self.is_reached = False
        self.hands_on_arguments, self.hands_rows_on = True, takes_keywords(model)
        self.residency = Residency()
        self.stays = False
        self.stage: Any = None
        self.state_hook: Any = None
        self.moves_with_padding: bool | None = None
        self.paged: PagedBatching | None = None
        self._next_task = 0
        self.names = {module: argument_names(module) for module in {model, self.body}}
        self.checkpointable = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self.only_full_attention = has_only_full_attention(model)
        try:
            self.freeze()
            self.patch.wrap_forward(model, self.call_model)
            if self.body is not model:
                self.patch.wrap_forward(self.body, self.call_base_model)
            self.patch.wrap_method("generate", self.call_generate)
            self.patch.wrap_method("prepare_inputs_for_generation", self.prepare_inputs)
            self.patch.wrap_method("_get_logits_processor", self.get_logits_processor)
            self.patch.wrap_method("generate_batch", self.call_generate_batch)
            self.patch.wrap_method("init_continuous_batching", self.start_continuous_batching)
            self.patch.wrap_method("destroy_cached_continuous_batching_manager", self.end_continuous_batching)
            setattr(model, ATTACHMENT, self)
        except BaseException:
            self.patch.undo()
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "paged": None}  # whose threads cannot be copied

    # -- what is attached

    def freeze(self) -> None:
        """Turns off the gradients of the model."""
        self.patch.freeze()

    def register(self, adapter: Attached) -> None:
        """Makes the module of an adapter one of the model's, so that `state_dict` and `.to(...)` include it."""
        if adapter.is_kept:
            self.patch.add_module(adapter.module, adapter.name)

    def set_decoder(self, decoder: PreTrainedModel | str, calls: Sequence[AttentionCall]) -> None:
        """Says where the attention layers are, or why they cannot be reached."""
        self.decoder, self.layers = decoder, [call.module for call in calls]
        self.head_groups = [call.group for call in calls]
        self.cache_layers = {call.cache_layer: i for i, call in enumerate(calls) if call.cache_layer is not None}
        is_decoder = bool(calls) and self.encoder is None and not is_encoder(self.model, calls)
        self.is_hybrid = is_decoder and has_other_layers(self.model, calls)
        self.encoder_layers = frozenset(i for i, call in enumerate(calls) if call.place == "encoder")
        self.decoder_layers = frozenset(i for i, call in enumerate(calls) if call.place == "decoder")
        if self.encoder is not None and not isinstance(decoder, str):
            self.positions = position_module(decoder)
            for module, around in ((self.encoder, self.call_encoder), (decoder, self.call_decoder)):
                self.names[module] = argument_names(module)
                self.patch.wrap_forward(module, around)
        self.moves_positions = isinstance(decoder, str) or moves_positions(self.model, decoder, calls)

    def add(self, adapter: Attached) -> Attached:
        """Attaches an adapter, in place of what has its name; after an error that one stays."""
        adapter.first_task, self._next_task = self._next_task, self._next_task + adapter.num_tasks
        group = head_group(self.model)
        agree_on_values(adapter.module, [*self.data_meshes, *([group.mesh] if group is not None else [])])
        try:
            if adapter.trained:
                self.patch.let_gradients_pass()
            if adapter.is_prefix:
                check_concatenated(self, adapter)
                reach(self)
            if adapter.name in self.adapters:
                self.remove(self.adapters[adapter.name])
            self.register(adapter)
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
            end_batching(self)
            self.patch.undo()

    @property
    def is_attached(self) -> bool:
        """Whether the model still carries this bank."""
        return self.model.__dict__.get(ATTACHMENT) is self

    @property
    def arguments(self) -> list[str]:
        """The arguments that a call of the model has in addition."""
        has_types = any(isinstance(adapter.module, CPTPrompt) for adapter in list(self.adapters.values()))
        return [TASK_IDS, TYPES] if has_types else [TASK_IDS]

    @property
    def checkpoints(self) -> bool:
        """Whether gradient checkpointing is on somewhere in the model."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.checkpointable)

    @property
    def is_disabled(self) -> bool:
        """Whether the running thread computes as if nothing were attached."""
        return is_disabled(self.patch)

    def disabled(self) -> AbstractContextManager[None]:
        """Inside, the running thread computes as if nothing were attached, with the attention that the model had."""
        return disable(self.patch)

    # -- calls

    def call_model(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the model."""
        if self.is_disabled:
            return self._call_bare(self.model, forward, args, kwargs)
        kwargs = as_keywords(self.names[self.model], args, kwargs)
        explicit = kwargs.get(TASK_IDS) is not None or generated_tasks(self.patch) is not None
        rows = pop_rows(self, kwargs)
        if self.encoder is not None:
            has_prefix = any(task.adapter.is_prefix for task in rows.tasks)
            if explicit or len(self.adapters) > 1 or (has_prefix and self.hands_rows_on):
                kwargs[ROWS] = RowPrefixes(rows, {})
            return forward(**kwargs)
        if self.model is self.decoder:
            forward = partial(decode, self, forward)
        elif self.cache_layers:
            forward = partial(hand_over, forward)
        if rows.placed:
            forward = place_prompts_in_text(self, forward, kwargs, rows)
        computed: dict[Task, Any] = {}
        prompts: dict[Task, Tensor] = {}
        answers = None
        if rows.prompts:
            answers = take_answers_loss(kwargs, rows)
            computed, prompts = place_prompts(self, kwargs, rows, in_rows=answers is not None)
        if computed or explicit or len(self.adapters) > 1:
            kwargs[ROWS] = RowPrefixes(rows, computed)
        if prompts or continues_after_prompts(kwargs, rows):
            with activate(self.patch):
                return call_with_prompts(self, forward, kwargs, rows, prompts, answers)
        if self.stays and not self.is_reached and is_known(self.model) and not has_axes(self.model):
            shift_positions(kwargs, 0, None)  # counted from the mask, as where a row has virtual tokens
        # Models without **kwargs (Bloom, Falcon, GPT-J, Mamba) do not hand the rows on to the model without a head.
        with activate(self.patch):
            return forward(**kwargs)

    def call_generate(self, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the model's generate: its rows' tasks are those of all calls of the model inside.

        They do not travel with the arguments, which generate hands on to an assistant model too.
        """
        task_ids = kwargs.pop(TASK_IDS, None)
        with generating(self.patch, task_ids):
            return generate(*args, **kwargs)

    def prepare_inputs(self, prepare: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a step of generate calls the model with: it makes the masks of a static cache, for whoever attends.

        Of a text that goes on from a cache it cuts what the cache holds, where virtual tokens are no part of the text.
        """
        if not self.is_disabled:
            reach_before_masks(self, kwargs)
            keep_new_text(args, kwargs)
        return prepare(*args, **kwargs)

    def get_logits_processor(self, get: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The logits processors of a generate."""
        return guide_without(self, get(*args, **kwargs))

    def call_generate_batch(self, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the model's generate_batch."""
        return generate_batch(self, generate, args, kwargs)

    def start_continuous_batching(self, start: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """The start of continuous batching, by whichever method."""
        return start_batching(self, args, kwargs)

    def end_continuous_batching(self, end: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """The end of continuous batching that was kept for a next session."""
        end_batching(self)
        return end()

    def call_base_model(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the model without its head, from the model or by itself."""
        base: Any = self.body
        if self.is_disabled:
            return self._call_bare(base, forward, args, kwargs)
        kwargs = as_keywords(self.names[base], args, kwargs)
        if (
            self.encoder is None
            and lacks_prompt(self, kwargs)
            and not any(isinstance(a.module, CPTPrompt) for a in self.adapters.values())
        ):
            # As TRL's trainers do, which compute their losses from the hidden states without the model's own head.
            return self.call_model(lambda **inserted: self.call_base_model(forward, (), inserted), (), kwargs)
        if base is self.decoder:
            return decode(self, forward, **kwargs)
        if self.encoder is not None:  # whose stacks put everything in
            return forward(**kwargs)
        check_inserted(self, base, kwargs)
        return forward(**kwargs)

    def call_decoder(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the decoder, from the model or by itself."""
        assert isinstance(self.decoder, PreTrainedModel)
        if self.is_disabled:
            return self._call_bare(self.decoder, forward, args, kwargs)
        return decode(self, forward, **as_keywords(self.names[self.decoder], args, kwargs))

    def call_encoder(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the encoder of an encoder-decoder, from the model, from generate or by itself."""
        assert self.encoder is not None
        if self.is_disabled:
            return self._call_bare(self.encoder, forward, args, kwargs)
        return encode(self, forward, as_keywords(self.names[self.encoder], args, kwargs))

    def call_positions(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the module that embeds the positions which the decoder counts."""
        assert self.positions is not None
        return embed_positions(self.names[self.positions], forward, args, kwargs)

    def _call_bare(
        self, module: PreTrainedModel, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A disabled call of `module`: the decoder gets the attention to use, where ours was put in."""
        kwargs.pop(TASK_IDS, None)
        is_ours = self.is_reached and (module is self.decoder or module is self.encoder)
        name = other_attention(module.config) if is_ours else None
        if name is not None and module.config._attn_implementation == ATTENTION and self.hands_on_arguments:
            kwargs[OTHER_ATTENTION] = name
        return forward(*args, **kwargs)
