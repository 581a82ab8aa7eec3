"""Reversible changes to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel

from .attention import SLOT, PrefixSlot

MODULE = "prefixcore"
"""The name under which the trainable module is registered in the model."""

ATTACHMENT = "_prefixcore_attachment"
"""The attribute of an attached model that says what is attached."""


_patches: WeakSet[Patch] = WeakSet()
"""The patches in force, of all models: two models may share one configuration."""


class Patch:
    """The changes made to one model, each undone by `undo` in reverse order.

    Plain data and no closures, so that copying or pickling an attached model copies its patch along with it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.frozen: list[tuple[nn.Parameter, bool]] = []
        self.attention: list[tuple[PretrainedConfig, str | None]] = []
        self.slots: list[nn.Module] = []
        self.hooks: list[RemovableHandle] = []

    def freeze(self) -> None:
        """Turns off the gradient of every parameter."""
        self.frozen = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        for parameter, _ in self.frozen:
            parameter.requires_grad_(False)

    def set_attention(self, backbone: PreTrainedModel, name: str) -> None:
        """Lets the attention of `backbone` run through the function registered as `name`."""
        # A configuration that another patch has switched already goes back to what it was before that.
        before = {id(config): former for patch in _patches for config, former in patch.attention}
        self.attention = [(c, before.get(id(c), former)) for c, former in attention_implementations(backbone)]
        _patches.add(self)
        backbone.set_attn_implementation(name)

    def add_module(self, module: nn.Module, attachment: Any) -> None:
        """Registers the trainable module, and what it belongs to."""
        self.model.add_module(MODULE, module)
        setattr(self.model, ATTACHMENT, attachment)

    def add_slot(self, module: nn.Module) -> PrefixSlot:
        """Gives an attention module a slot for its prefix."""
        slot = PrefixSlot()
        setattr(module, SLOT, slot)
        self.slots.append(module)
        return slot

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Calls `hook(module, args, kwargs)` before each forward of `module`, ahead of hooks that are there."""
        self.hooks.append(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Calls `hook(module, args, kwargs, output)` after each forward of `module`, ahead of hooks that are there."""
        self.hooks.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))

    def undo(self) -> None:
        """Puts the model back to what it was. A second call does nothing."""
        while self.hooks:
            self.hooks.pop().remove()
        while self.slots:
            delattr(self.slots.pop(), SLOT)
        if MODULE in self.model._modules:
            delattr(self.model, MODULE)
        self.model.__dict__.pop(ATTACHMENT, None)
        _patches.discard(self)
        in_use = {id(config) for patch in _patches for config, _ in patch.attention}
        restore_attention([(config, former) for config, former in self.attention if id(config) not in in_use])
        self.attention = []
        for parameter, flag in self.frozen:
            parameter.requires_grad_(flag)
        self.frozen = []


def attention_implementations(model: PreTrainedModel) -> list[tuple[PretrainedConfig, str | None]]:
    """Every configuration in `model`, once, with the attention implementation that it names."""
    found: dict[int, PretrainedConfig] = {}

    def visit(config: PretrainedConfig) -> None:
        if id(config) not in found:
            found[id(config)] = config
            for name in config.sub_configs:
                if isinstance(inner := getattr(config, name, None), PretrainedConfig):
                    visit(inner)

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            visit(module.config)
    return [(config, config._attn_implementation) for config in found.values()]


def restore_attention(implementations: list[tuple[PretrainedConfig, str | None]]) -> None:
    """Sets back what `attention_implementations` found."""
    for config, name in implementations:
        # Not through the public setter: it checks again what was accepted once, and spreads to inner configurations.
        config._attn_implementation_internal = name


@contextmanager
def frozen_run(model: PreTrainedModel, attention: str | None = None) -> Iterator[None]:
    """Run `model` without gradients, dropout or autocast, and leave no trace; `attention` names the function to use."""
    training = [(module, module.training) for module in model.modules()]
    implementations = attention_implementations(model)
    try:
        model.eval()
        if attention is not None:
            model.set_attn_implementation(attention)
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        restore_attention(implementations)
        for module, flag in training:
            module.training = flag
