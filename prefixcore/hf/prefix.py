"""A prefix attached to a model: evaluated once a forward, handed to each layer, and positions moved by P."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..nn import Prefix
from .attachment import Attachment, refuse_attention_weights, refuse_other_attention, refuse_replicas
from .attention import ATTENTION, KeyValue
from .discover import AttentionCall, check_reached
from .packing import set_empty_mask
from .positions import argument_names, as_keywords, shift_positions


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
        self._checkpointable = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self._baked: list[KeyValue] | None = None
        self._baked_from: list[Tensor] = []
        self._baked_versions: list[tuple[int, int]] = []
        try:
            self.patch.freeze()
            self.patch.set_attention(backbone, ATTENTION)
            check_reached(backbone, list(calls))
            self.patch.add_module(module, self)
            self.layer_prefixes = [self.patch.add_layer_prefix(call.module) for call in calls]
            self.patch.hook_before(backbone, self.before_forward)
        except BaseException:
            self.patch.undo()
            raise

    def __getstate__(self) -> dict[str, Any]:
        # A copy computes its own prefix in its first forward.
        return {**self.__dict__, "_baked": None, "_baked_from": [], "_baked_versions": []}

    def before_forward(
        self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The hook before each forward of the backbone."""
        if self.is_disabled:
            return args, self.disabled_arguments(self.backbone, kwargs)
        self._check(backbone, kwargs)
        self._set_layer_prefixes()
        kwargs = as_keywords(self.names, args, kwargs)
        if kwargs.get("cu_seq_lens_q") is not None:
            set_empty_mask(kwargs)
        shift_positions(kwargs, self.num_virtual_tokens, self.limit)
        return (), kwargs

    def _check(self, backbone: nn.Module, kwargs: dict[str, Any]) -> None:
        """Raises where the prefix would silently be left out, or trained wrongly."""
        refuse_other_attention(self.backbone)
        refuse_replicas(backbone)
        refuse_attention_weights(self.backbone, kwargs)
        if backbone.training and torch.is_grad_enabled() and _checkpoints_reentrantly(self._checkpointable):
            raise RuntimeError(
                "reentrant gradient checkpointing gives a prefix no gradient, or several: turn it on with "
                "{'use_reentrant': False}, which is transformers' default"
            )

    def _set_layer_prefixes(self) -> None:
        """Hands each layer its prefix: with its graph while something is trained, else the baked one."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.module.parameters()):
            self._baked = None  # a training step may follow
            for layer_prefix, key_value in zip(self.layer_prefixes, self.module(), strict=True):
                layer_prefix.differentiable = key_value
            return
        for layer_prefix, key_value in zip(self.layer_prefixes, self._bake(), strict=True):
            layer_prefix.baked = key_value
            if torch.is_grad_enabled():
                layer_prefix.differentiable = key_value

    def _bake(self) -> list[KeyValue]:
        """The prefix without its graph, computed again only where a tensor that it is made of has changed."""
        if torch.compiler.is_compiling():  # compiled code has no addresses to compare, and computes it each time
            return [(key.detach(), value.detach()) for key, value in self.module()]
        baked = self._baked  # another thread may drop it
        if baked is None or self._baked_versions != _versions(self._baked_from):
            # Ordinary tensors even in inference mode: a later forward may need them in a graph.
            with torch.inference_mode(False), torch.no_grad():
                self._baked = baked = [(key.detach(), value.detach()) for key, value in self.module()]
            self._baked_from = [*self.module.parameters(), *self.module.buffers()]
            self._baked_versions = _versions(self._baked_from)
        return baked


def _versions(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """Address and version counter of each: a replaced or changed tensor has others."""
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]


def _checkpoints_reentrantly(modules: list[nn.Module]) -> bool:
    """Whether gradient checkpointing is on and reentrant in the first of `modules` where it is on."""
    for module in modules:
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            return isinstance(function, partial) and bool(function.keywords.get("use_reentrant", True))
    return False
