"""A prefix attached to a model: evaluated once a forward, put into the slots, and the sequence moved after it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..nn import Prefix
from .attachment import Attachment, refuse_other_attention, refuse_replicas, refuse_weights
from .attention import ATTENTION, Pair
from .discover import AttentionCall, check_reached
from .packing import leave_mask_to_lengths
from .positions import argument_names, by_name, shift_positions


class PrefixAttachment(Attachment):
    """What connects a `Prefix` to the layers of a model that it is for.

    Args:
        model: the model as the user knows it.
        backbone: the text decoder inside it that holds the attention layers and takes `position_ids`.
        module: the prefix, one (key, value) for each of `calls`.
        calls: the attention layers that get it.
    """

    def __init__(
        self, model: PreTrainedModel, backbone: PreTrainedModel, module: Prefix, calls: Sequence[AttentionCall]
    ) -> None:
        super().__init__(model, module)
        self.backbone = backbone
        self.names = argument_names(backbone)
        self._baked: list[Pair] | None = None
        self._sources: list[Tensor] = []
        self._state: list[tuple[int, int]] = []
        try:
            self.patch.freeze()
            self.patch.set_attention(backbone, ATTENTION)
            check_reached(backbone, list(calls))
            self.patch.add_module(module, self)
            self.slots = [self.patch.add_slot(call.module) for call in calls]
            self.patch.before(backbone, self.before_forward)
        except BaseException:
            self.patch.undo()
            raise

    def __getstate__(self) -> dict[str, Any]:
        # What one forward computed stays here; a copy computes its own.
        return {**self.__dict__, "_baked": None, "_sources": [], "_state": []}

    def before_forward(
        self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The hook before each forward of the backbone."""
        if not self.enabled:
            return args, kwargs
        self._check(backbone, kwargs)
        self._fill_slots()
        kwargs = by_name(self.names, args, kwargs)
        if kwargs.get("cu_seq_lens_q") is not None:
            leave_mask_to_lengths(kwargs)
        shift_positions(kwargs, self.num_virtual_tokens, self.limit)
        return (), kwargs

    def _check(self, backbone: nn.Module, kwargs: dict[str, Any]) -> None:
        """Refuses what would leave the prefix out, or train it wrongly, in silence."""
        refuse_other_attention(self.backbone)
        refuse_replicas(backbone)
        refuse_weights(self.backbone, kwargs)
        if backbone.training and torch.is_grad_enabled() and _checkpoints_reentrantly(self.model):
            raise RuntimeError(
                "reentrant gradient checkpointing gives a prefix no gradient, or several: turn it on with "
                "{'use_reentrant': False}, which is transformers' default"
            )

    def _fill_slots(self) -> None:
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.module.parameters()):
            self._baked = None  # a training step may follow
            for slot, pair in zip(self.slots, self.module(), strict=True):
                slot.differentiable = pair
            return
        for slot, pair in zip(self.slots, self._baked_values(), strict=True):
            slot.baked = pair
            if torch.is_grad_enabled():
                slot.differentiable = pair

    def _baked_values(self) -> list[Pair]:
        """The prefix without its graph, computed anew only where something it is made of has changed."""
        if torch.compiler.is_compiling():  # compiled code has no addresses to compare, and computes it each time
            return [(key.detach(), value.detach()) for key, value in self.module()]
        if self._baked is None or self._state != [(t.data_ptr(), t._version) for t in self._sources]:
            # Ordinary tensors even in inference mode: a later forward may need them in a graph.
            with torch.inference_mode(False), torch.no_grad():
                self._baked = [(key.detach(), value.detach()) for key, value in self.module()]
            self._sources = [*self.module.parameters(), *self.module.buffers()]
            self._state = [(t.data_ptr(), t._version) for t in self._sources]
        return self._baked


def _checkpoints_reentrantly(model: PreTrainedModel) -> bool:
    """Whether gradient checkpointing is on and reentrant."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            return isinstance(function, partial) and bool(function.keywords.get("use_reentrant", True))
    return False
