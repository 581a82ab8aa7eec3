"""The layers below the first one whose prefix is trained: what they make of a text is the same in every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .layer_list import AsOutput, find_layers, read_output
from .model.wrapped import WrappedMethod
from .trained_layers import first_trained

if TYPE_CHECKING:
    from .handle import Handle


class LowerLayers:
    """The layers of a model below the first one whose prefix is trained.

    They have no prefix, or one that stays as it is (`train_layers`). No gradient goes there, so autograd keeps nothing
    of them. What the last of them passes on can be recorded in one call, and given in another one, which then begins at
    the layer above. Embeddings, positions, masks and what else a model hands to its layers it makes itself in either
    call. Calls inside the two blocks below are for one thread.

    Args:
        handle: of a prefix that is not trained in the first layers.

    Attributes:
        layers: the modules, in their order.
        first: which attention layer, counted from 0, is the first whose prefix is trained.
        prefix: the keys and values that these layers see before the text, one after another.

    Raises:
        ValueError: there are no such layers.
        NotImplementedError: they cannot be told from the others, or something else is attached that may reach them.
    """

    def __init__(self, handle: Handle) -> None:
        bank, own = handle._bank, handle._adapter.layers
        if own is None:
            raise ValueError(
                "a soft prompt stands below the first layer, so no layer is the same in every step; take a prefix "
                "(PrefixTuningConfig) that is trained in the upper layers"
            )
        first = first_trained(handle)
        if first is None:
            raise ValueError("no layer's prefix is trained; load the adapter with trainable=True")
        if first == 0:
            raise ValueError(
                "the prefix of layer 0 is trained, so no layer lies below; train upper layers alone (train_layers, "
                f"--train-layers), such as {len(bank.layers) // 2} to {len(bank.layers) - 1}"
            )
        self.first = first
        self.prefix = [
            tensor.detach() for layer, pair in zip(own, handle.bake(), strict=True) if layer < first for tensor in pair
        ]
        if len(bank.adapters) > 1:
            raise NotImplementedError(
                f"{len(bank.adapters)} adapters are attached, and others may reach the layers below this prefix; "
                "attach it alone"
            )
        if bank.encoder is not None or isinstance(bank.decoder, str):
            raise NotImplementedError(
                f"{type(handle.model).__name__} is no decoder of one stack, so no layers lie below all with a prefix"
            )
        self.layers = _below(bank.decoder, bank.layers, self.first)
        self._as_output: AsOutput | None = None

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """A block in which what each call of the model passes on to the layer above these is put in a list.

        [B, T, E] each, without a graph.

        Raises:
            NotImplementedError: a layer passes on something else, or more; or what it passes on has a graph.
        """
        found: list[Tensor] = []

        def record(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = forward(*args, **kwargs)
            hidden, self._as_output = _read(output, self.layers[-1])
            found.append(hidden)
            return output

        wrapped = WrappedMethod(self.layers[-1], "forward", record)
        try:
            yield found
        finally:
            wrapped.undo()

    @contextmanager
    def given(self, hidden: Tensor) -> Iterator[None]:
        """A block in which calls of the model begin at the layer above these.

        Args:
            hidden: [B, T, E], what the layer below passes on, for as many rows and tokens as the calls have.

        Raises:
            RuntimeError: nothing has been recorded yet, so it is not known how a layer passes it on.
        """
        if self._as_output is None:
            raise RuntimeError("record one call before giving what it recorded to others")
        output = self._as_output(hidden)
        wrapped = [WrappedMethod(layer, "forward", lambda forward, args, kwargs: output) for layer in self.layers]
        try:
            yield
        finally:
            for each in reversed(wrapped):
                each.undo()


def _below(decoder: nn.Module, attention: Sequence[nn.Module], first: int) -> list[nn.Module]:
    """The layers of `decoder` below the one that holds its attention layer `first`."""
    found = find_layers(decoder, attention)
    if found is None:
        raise NotImplementedError(
            f"{type(decoder).__name__} does not hold its layers as one list of modules, each called once, so it cannot "
            f"begin at layer {first}"
        )
    layers, where = found
    return list(layers)[: where[first]]


def _read(output: Any, layer: nn.Module) -> tuple[Tensor, AsOutput]:
    """What a layer passes on, without a graph, and what makes such an output of other values."""
    hidden, as_output = read_output(output, layer)
    if hidden.requires_grad:
        raise NotImplementedError(
            "something below the first trained layer of the prefix is trained too (modules_to_save, a PEFT adapter), "
            "so what these layers pass on changes from step to step and cannot be kept"
        )
    return hidden.detach(), as_output
