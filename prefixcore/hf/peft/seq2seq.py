"""The forward of a `PeftModelForSeq2SeqLM`: virtual tokens before the encoder, the decoder, or in its self-attention.

A soft prompt stands before what the encoder reads. Multitask prompt tuning has one before what the decoder reads, too,
in `forward` and not in `generate`, which is PEFT's. A prefix is in the decoder's self-attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model.signature import as_keywords
from .encoder import prompt
from .methods import active_config, is_prefix, method
from .soft_prompt import embed

_ARGUMENTS = [
    "input_ids",
    "attention_mask",
    "inputs_embeds",
    "decoder_input_ids",
    "decoder_attention_mask",
    "decoder_inputs_embeds",
    "labels",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "task_ids",
]
"""Those of `PeftModelForSeq2SeqLM.forward`, in its order."""


def seq2seq_forward(peft_model: Any, *args: Any, **kwargs: Any) -> Any:
    """One forward with the active adapter; arguments and output are those of the PeftModel's own."""
    call, config = as_keywords(_ARGUMENTS, args, kwargs), active_config(peft_model)
    task_ids = call.pop("task_ids", None)
    if call.get("input_ids") is None and call.get("inputs_embeds") is None:
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    peft_model._adjust_prompt_learning_kwargs(config, kwargs=call)
    if is_prefix(peft_model):
        return peft_model.base_model(**{name: value for name, value in call.items() if value is not None})
    virtual = prompt(peft_model, str(peft_model.active_adapter), task_ids)
    count = config.num_virtual_tokens
    _put_before(peft_model, call, virtual[..., :count, :])
    if method(peft_model) == "MULTITASK_PROMPT_TUNING" and virtual.shape[-2] > count:
        _read_labels(peft_model, call)
        _put_before(peft_model, call, virtual[..., count:, :], "decoder_")
        if call.get("labels") is not None:
            call["labels"] = _prepended(call["labels"], count, -100)
    return peft_model.base_model(**call)


def _put_before(peft_model: Any, call: dict[str, Any], virtual: Tensor, stack: str = "") -> None:
    """Puts virtual tokens, [P, E] or [B, P, E], before what a stack reads, in place."""
    ids, embeds = call.pop(f"{stack}input_ids", None), call.get(f"{stack}inputs_embeds")
    call[f"{stack}inputs_embeds"] = embed(peft_model, virtual, ids, embeds)
    mask = call.get(f"{stack}attention_mask")
    if mask is not None:
        call[f"{stack}attention_mask"] = _prepended(mask, virtual.shape[-2], 1)


def _read_labels(peft_model: Any, call: dict[str, Any]) -> None:
    """Lets the decoder read the labels, shifted, where it is given nothing else, in place."""
    from peft.utils import shift_tokens_right

    if call.get("decoder_input_ids") is not None or call.get("decoder_inputs_embeds") is not None:
        return
    if call.get("labels") is None:
        raise ValueError(
            f"{type(peft_model.base_model).__name__} needs either decoder_input_ids or decoder_inputs_embeds, or "
            "labels, which its decoder's input is made of"
        )
    config = peft_model.base_model.config
    call["decoder_input_ids"] = shift_tokens_right(call["labels"], config.pad_token_id, config.decoder_start_token_id)


def _prepended(tensor: Tensor, count: int, value: int) -> Tensor:
    """[B, count + T], with `value` before each row of [B, T]."""
    return torch.cat((tensor.new_full((tensor.shape[0], count), value), tensor), 1)
