"""The calls that an attached model refuses."""

from __future__ import annotations

import sys
import warnings
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..families import attention_dropout
from .interface import ATTENTION

_ULYSSES = "deepspeed.runtime.sequence_parallel.parallel_state_sp"
"""Where DeepSpeed keeps the processes that share a sequence; Accelerate's `sp` is the same."""


class RefusedReplica:
    """In place of the method by which `torch.nn.DataParallel` copies a module: its copies would share one forward."""

    def __call__(self) -> Any:
        raise RuntimeError(
            "torch.nn.DataParallel is not supported: start one process a device (torchrun or accelerate launch)"
        )


def refuse_attention_weights(decoder: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Raises NotImplementedError for a call that asks for attention weights: an online softmax never forms them."""
    if kwargs.get("output_attentions") or decoder.config.output_attentions:
        raise NotImplementedError(
            "output_attentions=True: prefix attention never forms attention weights; leave it out, or detach first"
        )


def refuse_other_attention(decoder: PreTrainedModel) -> None:
    """Raises RuntimeError if the attention of `decoder`, which was switched to ours, was switched again."""
    name = decoder.config._attn_implementation
    if name != ATTENTION:
        raise RuntimeError(
            f"the attention implementation was set to {name!r} after virtual tokens were attached, so they would not "
            f"be seen; call set_attn_implementation({ATTENTION!r}), or detach first"
        )


def refuse_context_parallelism() -> None:
    """Raises NotImplementedError where each process has a part of every row: `context_parallel`, DeepSpeed's Ulysses.

    Attention of their own then asks the other processes for their keys. Ours does not, and would see its part alone.
    """
    if torch.compiler.is_compiling():
        return
    module = getattr(torch.nn.functional.scaled_dot_product_attention, "__module__", None) or ""
    ulysses = getattr(sys.modules.get(_ULYSSES), "_SEQUENCE_PARALLEL_GROUP", None)
    if module.startswith("torch.distributed.") or (ulysses is not None and ulysses.size() > 1):
        raise NotImplementedError(
            "context parallelism gives each process a part of every sequence, of whose other parts virtual tokens know "
            "nothing: use data, tensor or pipeline parallelism, or pack fewer tokens into a batch"
        )


def refuse_reentrant_checkpointing(modules: list[nn.Module]) -> None:
    """Raises RuntimeError if gradient checkpointing is on and reentrant in the first of `modules` where it is on."""
    for module in modules:
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(function, partial) and function.keywords.get("use_reentrant", True):
                raise RuntimeError(
                    "reentrant gradient checkpointing gives a prefix no gradient, or several: turn it on with "
                    "{'use_reentrant': False}, which is transformers' default"
                )
            return


def warn_of_dropout(model: PreTrainedModel) -> None:
    """Warns if the attention that ours replaces has dropout of its weights, which ours does not apply."""
    for name, rate in attention_dropout(model).items():
        warnings.warn(
            f"config.{name} is {rate}: attention through prefixcore (a prefix, or packed batches) drops no weights "
            "out in training (the frozen model's other dropout stays; set the rate to 0 to silence this)",
            stacklevel=4,
        )


def refuse_unshareable(decoder: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Raises NotImplementedError for a packed batch in which one soft prompt for all sequences would not be right."""
    if kwargs.get("output_router_logits") or getattr(decoder.config, "output_router_logits", False):
        raise NotImplementedError(
            "output_router_logits: a packed batch has its soft prompt once, so the router's loss would not be that "
            "of padded rows; leave it out, or pad the sequences into rows of their own"
        )
    types, cu_seqlens = kwargs.get("token_type_ids"), kwargs["cu_seq_lens_q"]
    if types is not None:
        first = types[0, cu_seqlens[:-1].long().clamp(max=types.shape[1] - 1)]
        if bool((first != first[0]).any()):
            raise NotImplementedError(
                "token_type_ids: packed sequences begin with different types, but have one soft prompt, of one "
                "type; pad them into rows of their own"
            )
