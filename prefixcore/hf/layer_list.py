"""The layers of a decoder or an encoder as one list of modules, and what each of them passes on to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

AsOutput = Callable[[Tensor], Any]
"""Makes what a layer returns of the hidden states [B, T, E] in it."""


def find_layers(decoder: nn.Module, attention: Sequence[nn.Module]) -> tuple[nn.ModuleList, list[int]] | None:
    """The list of the layers of `decoder`, and in which of them each of its attention modules is.

    None: there is no such list, or one of its layers is called twice.
    """
    for layers in decoder.modules():
        if not isinstance(layers, nn.ModuleList):
            continue
        place = {inner: i for i, layer in enumerate(layers) for inner in layer.modules()}
        where = [place.get(each, -1) for each in attention]
        if where and where[0] >= 0 and all(one < other for one, other in zip(where, where[1:], strict=False)):
            return layers, where
    return None


def read_output(output: Any, layer: nn.Module) -> tuple[Tensor, AsOutput]:
    """What a layer passes on, and what makes such an output of other values."""
    hidden = output
    as_output: AsOutput = _alone
    if isinstance(output, tuple) and output and all(each is None for each in output[1:]):
        hidden, as_output = output[0], partial(_first_of, len(output))
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        got = f"a tensor {list(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
        raise NotImplementedError(
            f"{type(layer).__name__} passes on {got} in place of one tensor [B, T, E], so it cannot be kept"
        )
    return hidden, as_output


def _alone(hidden: Tensor) -> Tensor:
    return hidden


def _first_of(length: int, hidden: Tensor) -> tuple[Tensor | None, ...]:
    return (hidden, *[None] * (length - 1))
