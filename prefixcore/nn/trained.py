"""Which parameters of a module of virtual tokens are trained, and which only go along.

What never changes (initial values that something is added to, frozen virtual tokens) is a parameter without a gradient
and not a buffer: engines that share out, load or gather a model's parameters know what to do with it, and DDP does not
send it with each forward.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def fixed(tensor: Tensor) -> nn.Parameter:
    """`tensor` as a parameter that never gets a gradient: modules read it detached, whatever `requires_grad` says."""
    return nn.Parameter(tensor, requires_grad=False)


def trained_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of `module` with their names, but for those in what its `fixed` names."""
    names = getattr(module, "fixed", ())
    return ((name, each) for name, each in module.named_parameters() if name.partition(".")[0] not in names)
