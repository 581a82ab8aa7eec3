"""A prefix of which some layers are trained, and the others keep their start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from ..nn import Prefix

if TYPE_CHECKING:
    from .handle import Handle


def train_layers(handle: Handle, layers: Sequence[int]) -> None:
    """Trains the prefix of these layers alone. That of all others keeps its values, and is seen as before.

    Where the others are the lower ones, no gradient goes there, and what they make of a text is the same in every step:
    `prefixcore.training.cache_activations` keeps it.

    Args:
        handle: of a prefix that is trained as it is, without a reparameterization.
        layers: which of its layers, counted from 0 over the model's.

    Raises:
        ValueError: no prefix, a reparameterized one, or layers that it does not have.

    Examples:
        >>> from prefixcore.training import train_layers
        >>> handle = prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4))
        >>> train_layers(handle, [1])
        >>> handle.num_trainable
        256
    """
    module, own = handle.module, handle._adapter.layers
    if not isinstance(module, Prefix) or own is None:
        raise ValueError(f"train_layers is for a prefix, and what is attached is {handle.config.method!r}")
    if module.layers is None:
        raise ValueError(
            f"train_layers: the prefix is trained through {module.config.reparameterization!r}, which makes the values "
            "of all its layers; take reparameterization='none'"
        )
    missing = sorted(set(layers) - set(own))
    if missing or not layers:
        named = f"layer {missing[0]} is not among" if missing else "expected at least one of"
        raise ValueError(f"train_layers: {named} the layers with a prefix, {own[0]} to {own[-1]}")
    for layer, pair in zip(own, module.layers, strict=True):
        pair.requires_grad_(layer in set(layers))


def first_trained(handle: Handle) -> int | None:
    """The first layer whose prefix is trained; None: it is no prefix, or nothing of it is trained."""
    module, own = handle.module, handle._adapter.layers
    if not isinstance(module, Prefix) or own is None:
        return None
    stack: nn.ModuleList | None = module.layers
    if stack is None:
        return min(own) if any(parameter.requires_grad for parameter in module.parameters()) else None
    trained = [layer for layer, pair in zip(own, stack, strict=True) if any(p.requires_grad for p in pair.parameters())]
    return min(trained, default=None)
