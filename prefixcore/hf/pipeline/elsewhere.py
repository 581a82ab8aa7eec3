"""What stands in the list of layers for those that other processes have."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..layer_list import AsOutput


class Passing:
    """The hidden states [B, T, E] that a running stage is given, and those that it passes on.

    Plain data for one thread, as torch's schedules run stages.

    Attributes:
        given: those of the stage before; None: this is the first.
        passed_on: those of its last layer; None: its model has not come there yet, or has all layers up to the last.
        is_running: whether a stage runs.
    """

    def __init__(self) -> None:
        self.given: Tensor | None = None
        self.passed_on: Tensor | None = None
        self.is_running = False


class LayerElsewhere(nn.Module):
    """In place of a layer that another process has: it hands hidden states on.

    Those below the layers of a stage hand on what the stage is given in place of what they get, which are embeddings.
    The first of those above keeps what it gets, which is what the stage passes on.

    Args:
        layer: the layer, of which what a decoder reads before it calls it is kept (which attention it has, say).
        number: its place among the layers.
        as_output: how it returns hidden states.
        passing: of the stage.
        is_below: whether it comes before the layers of the stage.
    """

    def __init__(self, layer: nn.Module, number: int, as_output: AsOutput, passing: Passing, is_below: bool) -> None:
        super().__init__()
        kept = {name: value for name, value in vars(layer).items() if isinstance(value, (str, int, float))}
        self.__dict__.update({name: value for name, value in kept.items() if name not in self.__dict__})
        self.number, self.as_output, self.passing, self.is_below = number, as_output, passing, is_below

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer would return, of the hidden states that come next."""
        passing = self.passing
        if not passing.is_running:
            raise RuntimeError(
                f"layer {self.number} is in another process, so the model cannot run by itself: call the schedule "
                "that has the stage of prefixcore.pipeline_stage; to generate, load the saved adapter on a model whose "
                "layers are all here (device_map spreads them over the devices of a process)"
            )
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if not self.is_below:
            if passing.passed_on is None:
                passing.passed_on = hidden
            return self.as_output(hidden)
        assert passing.given is not None
        if passing.given.shape != hidden.shape:
            raise ValueError(
                f"the stage before hands on hidden states {list(passing.given.shape)}, but this one reads a batch "
                f"whose are {list(hidden.shape)}: every process has to be given the same batch, and torch makes room "
                "for the shape of the first step alone, so pad all batches to one length"
            )
        return self.as_output(passing.given)
