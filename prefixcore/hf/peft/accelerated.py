"""`Accelerated`: what `accelerate` returns, and the methods that it puts on the PeftModel."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from ...ops import which_backend
from ...ops.select import Choice
from ..batch.tasks import TASK_IDS
from ..families import is_known
from ..model.active import activate
from ..model.undone import UndoneAfterBlock
from ..positions.positions import past_length, query_length
from .checkpointing import checkpointing_hidden
from .generation import without_another_prompt
from .methods import active_config, is_prefix, is_seq2seq, method
from .prefix import PeftBank
from .resume import resume
from .seq2seq import seq2seq_forward
from .soft_prompt import soft_prompt_forward

ACCELERATED = "_prefixcore_accelerated"
"""The attribute of a PeftModel that holds its `Accelerated`."""

_METHODS = ("forward", "generate", "add_adapter", "load_adapter", "prepare_inputs_for_generation")

_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""Methods of the base model that a PeftModel hands out as they are, without its virtual tokens."""


class _Method:
    """What stands on a PeftModel in place of a method of its own.

    No bound method, of which accelerate takes the function, for mixed precision, and binds it to the model.
    """

    def __init__(self, accelerated: Accelerated, name: str) -> None:
        self.accelerated, self.name = accelerated, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.accelerated.model:  # accelerate's unwrap_model binds what it finds
            args = args[1:]
        return getattr(self.accelerated, self.name)(*args, **kwargs)

    __code__ = __call__.__code__  # torch.export names its inputs by where this is

    @property
    def __signature__(self) -> inspect.Signature:
        """That of PEFT's method: transformers' `generate`, among others, reads there which arguments a model takes."""
        model = self.accelerated.model
        method = getattr(type(model), self.name, None)
        return inspect.signature(getattr(model.base_model, self.name) if method is None else method.__get__(model))


class Accelerated(UndoneAfterBlock):
    """A PeftModel on prefixcore's ops. As a context manager it is undone at the end of the block.

    Attributes:
        model: the PeftModel, changed in place.

    Examples:
        >>> import peft
        >>> config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        >>> accelerated = prefixcore.accelerate(peft.get_peft_model(model, config))
        >>> accelerated
        Accelerated(PROMPT_TUNING on LlamaForCausalLM)
        >>> accelerated.undo()
        >>> accelerated.is_accelerated
        False
    """

    def __init__(self, model: Any, bank: PeftBank | None) -> None:
        self.model = model
        self._bank = bank
        if bank is not None:
            bank.adapter.handle = self
        model.__dict__[ACCELERATED] = self
        for name in _METHODS:
            # PEFT's generate leaves the last on the base model of an encoder-decoder, whose steps go without a prompt.
            if hasattr(type(model), name) and not (name == "prepare_inputs_for_generation" and is_seq2seq(model)):
                model.__dict__[name] = _Method(self, name)
        for name in _BATCHING:
            if hasattr(model.base_model, name):
                model.__dict__[name] = _Method(self, name)

    @property
    def is_accelerated(self) -> bool:
        """Whether the model still runs on our ops."""
        return self.model.__dict__.get(ACCELERATED) is self

    def backend(self) -> Choice:
        """Which backend the op behind the model (`prefix_attention` or `soft_embedding`) uses here, and why."""
        op = "prefix_attention" if is_prefix(self.model) else "soft_embedding"
        return which_backend(op, self.model.base_model.device, self.model.base_model.dtype)

    def undo(self) -> None:
        """Puts PEFT's own methods back, on what has been trained meanwhile. A second call does nothing."""
        if not self.is_accelerated:
            return
        for name in (*_METHODS, *_BATCHING):
            if getattr(self.model.__dict__.get(name), "accelerated", None) is self:
                del self.model.__dict__[name]
        del self.model.__dict__[ACCELERATED]
        if self._bank is not None:
            self._bank.undo()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`PeftModel.forward`."""
        if not self.is_accelerated or self.model._adapters_disabled:  # as PEFT's disable_adapter leaves it behind
            return type(self.model).forward(self.model, *args, **kwargs)
        if is_seq2seq(self.model):
            with self._seen():
                return seq2seq_forward(self.model, *args, **kwargs)
        if self._bank is None:
            return soft_prompt_forward(self.model, *args, **kwargs)
        return self._prefix_forward(*args, **kwargs)

    def _prefix_forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        from peft import PeftModelForCausalLM, PeftModelForFeatureExtraction

        only_causal = isinstance(self.model, (PeftModelForCausalLM, PeftModelForFeatureExtraction))
        positions = kwargs.pop("position_ids", None)
        if positions is None and attention_mask is not None and is_known(self.model.base_model):
            # PEFT's: padding on the left counts.
            call = {**kwargs, "input_ids": input_ids, "inputs_embeds": inputs_embeds}
            length = query_length(call)
            positions = (torch.arange(length, device=attention_mask.device) + past_length(call)).unsqueeze(0)
        self.model._adjust_prompt_learning_kwargs(
            active_config(self.model), kwargs=kwargs, remove_token_type_ids=only_causal
        )
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "position_ids": positions,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        kwargs.update({name: value for name, value in given.items() if value is not None})
        with self._seen():
            return self.model.base_model(**kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`PeftModel.generate`."""
        from peft import PeftModelForCausalLM

        model = self.model
        if is_seq2seq(model) and args:
            raise TypeError(f"{type(model).__name__}.generate takes its arguments by name: generate(input_ids=...)")
        if self.is_accelerated and model._adapters_disabled and is_seq2seq(model):  # PEFT puts a soft prompt in
            kwargs.pop(TASK_IDS, None)
            return model.base_model.generate(*args, **kwargs)
        if self._bank is None or not self.is_accelerated or model._adapters_disabled:
            return type(model).generate(model, *args, **kwargs)
        config = active_config(model)
        if is_seq2seq(model):
            model._adjust_prompt_learning_kwargs(config, kwargs=kwargs)
        if isinstance(model, PeftModelForCausalLM):  # one that was set on the PeftModel counts
            model.base_model.generation_config = model.generation_config
        kwargs.pop(TASK_IDS, None)  # PEFT lets prefixes have them, of which it makes no use
        with self._seen():
            return model.base_model.generate(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """`generate_batch` of the base model, with the prefix."""
        with self._batching():
            return self.model.base_model.generate_batch(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """`init_continuous_batching` of the base model, with the prefix."""
        with self._batching():
            return self.model.base_model.init_continuous_batching(*args, **kwargs)

    @contextmanager
    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """`continuous_batching_context_manager` of the base model, with the prefix."""
        manager = self.model.base_model.continuous_batching_context_manager(*args, **kwargs)
        with ExitStack() as stack:
            with self._batching():
                entered = stack.enter_context(manager)
            yield entered

    def _batching(self) -> AbstractContextManager[None]:
        """Where continuous batching starts.

        Raises:
            NotImplementedError: the active adapter is a soft prompt, which is not on the base model.
        """
        if not self.is_accelerated or self.model._adapters_disabled:
            return nullcontext()
        if self._bank is None:
            or_load = (
                ", or prefixcore.load(base_model, folder) what save_pretrained wrote, whose generate_batch shows it"
            )
            raise NotImplementedError(
                f"continuous batching (generate_batch) of a PeftModel is that of its base model, without its "
                f"{method(self.model)}: call generate on padded batches{'' if is_seq2seq(self.model) else or_load}"
            )
        return self._seen()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """`PeftModelForCausalLM.prepare_inputs_for_generation`, which `generate` calls for each step."""
        inputs = type(self.model).prepare_inputs_for_generation(self.model, *args, **kwargs)
        return inputs if is_prefix(self.model) else without_another_prompt(self.model, inputs)

    def add_adapter(self, adapter_name: str, peft_config: Any, **kwargs: Any) -> None:
        """`PeftModel.add_adapter`, also while gradient checkpointing is on."""
        with checkpointing_hidden(self.model.base_model):
            type(self.model).add_adapter(self.model, adapter_name, peft_config, **kwargs)

    def load_adapter(self, model_id: Any, adapter_name: str, is_trainable: bool = False, **kwargs: Any) -> Any:
        """`PeftModel.load_adapter`, also of virtual tokens whose training is to go on."""
        result = type(self.model).load_adapter(self.model, model_id, adapter_name, **kwargs)
        if is_trainable:
            resume(self.model, adapter_name)
        return result

    def _seen(self) -> AbstractContextManager[None]:
        return nullcontext() if self._bank is None else activate(self._bank)

    def _take_back(self) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "" if self.is_accelerated else ", undone"
        return f"Accelerated({method(self.model)} on {type(self.model.base_model).__name__}{state})"
