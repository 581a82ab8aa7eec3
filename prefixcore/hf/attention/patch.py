"""Reversible changes to a model."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..model.devices import device_of
from ..model.four_bits import SWITCH, lay_out_as_loaded, layers_with_switch
from ..model.peft_parameters import flags_to_restore
from ..model.sharded import reshard
from ..model.wrapped import Around, WrappedMethod
from .interface import LAYER, Layer
from .refusals import RefusedReplica

MODULE = "prefixcore"
"""The name under which the trainable module is registered in the model."""

ATTACHMENT = "_prefixcore_attachment"
"""The attribute of an attached model that says what is attached."""

changing_modules = threading.RLock()
"""Held while adapters are registered on a model or taken away, and while all of a model's modules are gone through."""

_REPLICATE = "_replicate_for_data_parallel"

_patches: WeakSet[Patch] = WeakSet()
"""The patches of all models; compiled code neither reads it, as torch 2.15 cannot guard it, nor changes it."""


class Patch:
    """The changes made to one model, which `undo` takes back.

    Plain data and no closures, so that copying or pickling an attached model copies its patch along with it.

    Attributes:
        model: the model.
        before: every configuration, and the attention implementation that it named without any patch.
        frozen: every parameter whose gradient was turned off, and whether it required one before.
        attention: every configuration that was switched, and the attention implementation it named before.
        layers: the attention layers that were numbered.
        forwards: the forwards that were wrapped, by their modules.
        methods: other methods of the model that were wrapped.
        attributes: what stands on modules in place of something of their own.
        four_bits: the layers that were kept in the form that gradients pass through.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # Two models may share a configuration: what another patch has switched goes back to what it was before that.
        original = {id(config): before for patch in _patches for config, before in patch.attention}
        self.before = [(c, original.get(id(c), named)) for c, named in attention_implementations(model)]
        self.frozen: list[tuple[nn.Parameter, bool]] = []
        self.attention: list[tuple[PretrainedConfig, str | None]] = []
        self.layers: list[nn.Module] = []
        self.methods: list[WrappedMethod] = []
        self.forwards: dict[nn.Module, WrappedMethod] = {}
        self.attributes: list[tuple[nn.Module, str]] = []
        self.four_bits: list[nn.Module] = []
        _patches.add(self)

    def freeze(self) -> None:
        """Turns off the gradient of every parameter."""
        reshard(self.model)  # FSDP's gathered parameters take their flag anew from those in parts at each forward
        self.frozen = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        for parameter, _ in self.frozen:
            parameter.requires_grad_(False)

    def let_gradients_pass(self) -> None:
        """Keeps layers from losing their backward, and gives those that have lost it theirs back."""
        for layer in list(layers_with_switch(self.model)):
            setattr(layer, SWITCH, False)
            self.four_bits.append(layer)
            lay_out_as_loaded(layer)

    def set_attention(self, backbone: PreTrainedModel, name: str) -> None:
        """Lets the attention of `backbone` run through the function registered as `name`."""
        before = {id(config): named for config, named in self.before}
        found = attention_implementations(backbone)
        self.attention = [(c, before.get(id(c), named) if named == name else named) for c, named in found]
        backbone.set_attn_implementation(name)

    def add_module(self, module: nn.Module, name: str | None = None) -> None:
        """Registers a trainable module: as `model.prefixcore`, or in it under a name."""
        if name is None:
            self.model.add_module(MODULE, module)
            return
        if MODULE not in self.model._modules:
            self.model.add_module(MODULE, nn.ModuleDict())
        bank = self.model.get_submodule(MODULE)
        assert isinstance(bank, nn.ModuleDict)
        with changing_modules:
            bank._modules[name] = module  # not by add_module, which refuses names of methods ("type", "keys")

    def remove_module(self, name: str | None) -> None:
        """Takes a module away that was registered under `name`."""
        modules = self.model._modules.get(MODULE)
        if isinstance(modules, nn.ModuleDict) and name is not None:
            with changing_modules:
                modules._modules.pop(name, None)

    def number_layers(self, layers: Sequence[nn.Module], are_handed_arguments: bool) -> None:
        """Tells each attention layer which one it is, and whether it gets the arguments of its decoder's call.

        Layers that share a module are in `layers` as often as it is called.
        """
        self.forget_layers()
        other = {id(config): name for config, name in self.attention}
        for layer in dict.fromkeys(layers):
            before = other.get(id(getattr(layer, "config", None))) or "eager"
            numbers = tuple(i for i, each in enumerate(layers) if each is layer)
            setattr(layer, LAYER, Layer(numbers, before, are_handed_arguments))
            self.layers.append(layer)

    def forget_layers(self) -> None:
        """Takes the numbers back."""
        while self.layers:
            delattr(self.layers.pop(), LAYER)

    def wrap_forward(self, module: nn.Module, around: Around) -> None:
        """Calls `around(forward, args, kwargs)` in place of the forward of `module`."""
        self.forwards[module] = WrappedMethod(module, "forward", around)
        module.__dict__[_REPLICATE] = RefusedReplica()

    def wrap_method(self, name: str, around: Around) -> None:
        """Calls `around(method, args, kwargs)` in place of a method of the model, where it has one of this name."""
        if hasattr(self.model, name):
            self.methods.append(WrappedMethod(self.model, name, around))

    def set_attribute(self, module: nn.Module, name: str, value: object) -> None:
        """Puts `value` in place of a buffer or a method of a module, which stays behind it."""
        module.__dict__[name] = value
        self.attributes.append((module, name))

    def undo(self) -> None:
        """Puts the model back to what it was. A second call does nothing."""
        while self.forwards:
            module, wrapped = self.forwards.popitem()
            wrapped.undo()
            module.__dict__.pop(_REPLICATE, None)
        while self.methods:
            self.methods.pop().undo()
        while self.attributes:
            module, name = self.attributes.pop()
            module.__dict__.pop(name, None)
        while self.four_bits:
            setattr(self.four_bits.pop(), SWITCH, True)
        self.forget_layers()
        if MODULE in self.model._modules:
            delattr(self.model, MODULE)
        self.model.__dict__.pop(ATTACHMENT, None)
        attention, self.attention = self.attention, []
        in_use = {id(config) for patch in _patches for config, _ in patch.attention}
        restore_attention([(config, before) for config, before in attention if id(config) not in in_use])
        for parameter, flag in flags_to_restore(self.model, self.frozen):
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
def _without_warning() -> Iterator[None]:
    """A block in which transformers does not warn of models that keep their attention: that is looked at afterwards."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_keep)
    try:
        yield
    finally:
        logger.removeFilter(_keep)


def _keep(record: logging.LogRecord) -> bool:
    return "does not support setting its attention implementation" not in record.getMessage()


@contextmanager
def frozen_run(model: PreTrainedModel, attention: str | None = None) -> Iterator[None]:
    """A block in which `model` runs without gradients, dropout or autocast; afterwards it is as it was.

    Also what modules remember of a call: where images stood (Qwen2-VL), say. Weights of 4 bits keep their form.

    Args:
        model: the model.
        attention: the attention implementation to use inside; None: the model's own.
    """
    attributes = [(module, list(module._parameters), dict(module.__dict__)) for module in model.modules()]
    implementations = attention_implementations(model)
    try:
        model.eval()
        for layer in layers_with_switch(model):
            setattr(layer, SWITCH, False)
        if attention is not None:
            with _without_warning():
                model.set_attn_implementation(attention)
        with torch.no_grad(), torch.autocast(device_of(model).type, enabled=False):
            yield
    finally:
        restore_attention(implementations)
        for module, names, before in attributes:
            if list(module._parameters) != names:  # compressed-tensors unpacks a model's weights at its first forward
                module.training = before["training"]
                continue
            module.__dict__.update(before)
            for name in [name for name in module.__dict__ if name not in before]:
                del module.__dict__[name]
