"""What a prefix and a soft prompt have in common once they are attached, and the calls that both refuse."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..nn import Prefix, SoftPrompt
from .attention import ATTENTION
from .disabled import OTHER_ATTENTION, disable, is_disabled, other_attention
from .families import attention_dropout, position_limit
from .patch import Patch
from .positions import takes_keywords


class Attachment:
    """What connects a trainable module to a model.

    Attributes:
        model: the model as the user knows it.
        module: the trainable module.
        handle: the `Handle` that the user holds.
        num_virtual_tokens: P.
        limit: positions that the model has learned; None: it computes them.
        patch: what was changed in the model, to be put back.
    """

    def __init__(self, model: PreTrainedModel, module: Prefix | SoftPrompt) -> None:
        self.model = model
        self.module: Any = module
        self.handle: Any = None
        self.num_virtual_tokens = module.num_virtual_tokens
        self.limit = position_limit(model)
        self.patch = Patch(model)

    @property
    def is_disabled(self) -> bool:
        """Whether the running thread computes as if nothing were attached."""
        return is_disabled(self.patch)

    def disabled(self) -> AbstractContextManager[None]:
        """Inside, the running thread computes as if nothing were attached, with the attention that the model had."""
        return disable(self.patch)

    def disabled_arguments(self, decoder: PreTrainedModel | str, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a disabled forward of `decoder`: with the attention to use, where ours was put in."""
        if isinstance(decoder, str):  # why there is none: a soft prompt that leaves attention alone
            return kwargs
        name = other_attention(decoder.config)
        if name is None or decoder.config._attn_implementation != ATTENTION or not takes_keywords(decoder):
            return kwargs
        return {**kwargs, OTHER_ATTENTION: name}


def refuse_replicas(module: nn.Module) -> None:
    """Raises RuntimeError under `torch.nn.DataParallel`, whose replicas share one attachment and one `LayerPrefix`."""
    if getattr(module, "_is_replica", False):
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


def warn_of_dropout(model: PreTrainedModel) -> None:
    """Warns if the attention that ours replaces has dropout of its weights, which ours does not apply."""
    for name, rate in attention_dropout(model).items():
        warnings.warn(
            f"config.{name} is {rate}: attention through prefixcore (a prefix, or packed batches) drops no weights "
            "out in training (the frozen model's other dropout stays; set the rate to 0 to silence this)",
            stacklevel=4,
        )
