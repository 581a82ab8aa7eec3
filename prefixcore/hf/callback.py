"""`PromptCallback`: what transformers' Trainer, and those built on it, tell their trackers of the virtual tokens."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from .handle import Handle, attached
from .measures import attention_on_prefix, norms

_CONSOLE = ("PrinterCallback", "ProgressCallback", "NotebookProgressCallback")
"""What prints logs; by name, as the last is in a module that needs IPython."""


class PromptCallback(TrainerCallback):
    """Logs norms, gradients and attention of the virtual tokens to whatever `report_to` names.

    The numbers of each layer go to the trackers and to `trainer.state.log_history`, and not to the console, beside the
    loss that Trainer logs itself:

    - `prefix_norm/layer_<n>`: of the layer's keys and values;
    - `prefix_grad_norm/layer_<n>`: of their gradient, as the optimizer gets it; one `prefix_grad_norm` for a
      reparameterization;
    - `prefix_attention/layer_<n>`: the share of attention on the prefix, in a few examples of the training data (in
      their prompts, where the model itself writes the rest: TRL's GRPOTrainer and RLOOTrainer);
    - `prompt_norm`, `prompt_grad_norm`: of a soft prompt.

    Checkpoints need no callback: they hold what is trained alone.

    Args:
        trainer: the Trainer that it is added to.
        every: optimizer steps between two measurements; None: as `logging_steps`.
        probes: how many examples of the training data the attention is measured on, one by one; 0: not at all.

    Raises:
        ValueError: nothing is attached to the Trainer's model, a number is out of range, or TRL has vLLM write the
            answers, to which it hands the base model alone.

    Examples:
        >>> from transformers import Trainer, TrainingArguments
        >>> handle = prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4))
        >>> arguments = TrainingArguments("out", max_steps=2, report_to=[], disable_tqdm=True, save_strategy="no")
        >>> data = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 2
        >>> trainer = Trainer(model, arguments, train_dataset=data)
        >>> trainer.add_callback(prefixcore.PromptCallback(trainer, every=1))
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        >>> sorted(trainer.state.log_history[0])[:2]
        ['epoch', 'prefix_attention/layer_0']
    """

    def __init__(self, trainer: Any, *, every: int | None = None, probes: int = 4) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1 or None, got {every}")
        if probes < 0:
            raise ValueError(f"probes must be at least 0, got {probes}")
        has_virtual_tokens = hasattr(getattr(trainer, "vllm_generation", None), "handle")  # `ServedRollouts`
        if getattr(trainer, "use_vllm", False) and not has_virtual_tokens:
            raise ValueError(
                f"{type(trainer).__name__} has its answers written by a vLLM of its own (use_vllm=True), to which it "
                "hands the base model without the virtual tokens, so that they learn from answers of another model; "
                "leave use_vllm off; prefixcore.ServedRollouts(trainer, url, adapters) has prefixcore serve write them"
            )
        self._trainer, self._every, self._num_probes = trainer, every, probes
        self._handle = find_handle(trainer.model)
        self._probes: list[dict[str, Any]] | None = None
        self._norms: dict[str, float] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures the gradients, which are gone after the step."""
        if self._is_due(state.global_step + 1):
            self._norms = norms(self._handle)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Logs what was measured."""
        if not self._is_due(state.global_step):
            return
        gradients = {name: value for name, value in self._norms.items() if "_grad_norm" in name}
        logs = {**norms(self._handle), **gradients, **attention_on_prefix(self._handle, self._probe_batches())}
        if state.epoch is not None:
            logs["epoch"] = state.epoch
        state.log_history.append({**logs, "step": state.global_step})
        for callback in self._trainer.callback_handler.callbacks:
            if not any(kind.__name__ in _CONSOLE for kind in type(callback).__mro__):
                callback.on_log(args, state, control, logs=dict(logs), model=self._handle.model)

    def _is_due(self, step: int) -> bool:
        state = self._trainer.state
        every = self._every or max(1, int(state.logging_steps or self._trainer.args.logging_steps))
        return step % every == 0

    def _probe_batches(self) -> list[dict[str, Any]]:
        """The first examples, each as a batch of its own, as the Trainer's collator makes it.

        TRL's trainers whose model writes the answers hand the rows on as they are: of those, the prompt.
        """
        if self._probes is None:
            data, collate = self._trainer.train_dataset, self._trainer.data_collator
            try:
                rows = [data[index] for index in range(min(self._num_probes, len(data)))]
                batches = [collate([row]) for row in rows]
                self._probes = [dict(x) if isinstance(x, Mapping) else self._of_prompt(x[0]) for x in batches]
            except (TypeError, NotImplementedError):  # a stream has neither a length nor places
                warnings.warn(
                    "the training data is a stream, so the attention on the prefix is not measured", stacklevel=2
                )
                self._probes = []
        return self._probes

    def _of_prompt(self, row: dict[str, Any]) -> dict[str, Any]:
        """A batch of a row's prompt, which is a text or a conversation."""
        prompt, tokenizer = row["prompt"], self._trainer.processing_class
        if isinstance(prompt, str):
            return dict(tokenizer(prompt, return_tensors="pt"))
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return dict(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options))


def find_handle(model: Any) -> Handle:
    """What is attached to a Trainer's model, or to one inside of it."""
    for module in model.modules():
        handle = attached(module) if isinstance(module, PreTrainedModel) else None
        if handle is not None:
            return handle
    raise ValueError(
        f"nothing is attached to {type(model).__name__}; call prefixcore.attach before the Trainer is made"
    )
