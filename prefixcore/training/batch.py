"""A batch: examples as the arguments of a model, and where each one's tokens stand in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .data import TokenizedExample, make_batch
from .tree import tree


@dataclass(frozen=True)
class Batch:
    """Examples as the arguments of a model.

    Attributes:
        examples: what is in it.
        arguments: for the model.
        places: for each example where its tokens stand, counted through the rows of the batch one after another.
    """

    examples: Sequence[TokenizedExample]
    arguments: dict[str, Any]
    places: Sequence[slice | Tensor]

    @classmethod
    def of(
        cls,
        examples: Sequence[TokenizedExample],
        pad_token_id: int,
        *,
        packed: bool,
        device: torch.device,
        sharing_width: int = 0,
    ) -> Batch:
        """Packed, or padded on the right; see `make_batch`.

        Args:
            examples: what is in it.
            pad_token_id: fills short rows.
            packed: whether it has no padding.
            device: where its tensors go.
            sharing_width: of a packed batch that may be a `tree` where that is less work, the model's hidden size; 0:
                it may not.
        """
        if packed and sharing_width and (shared := tree(examples, sharing_width, device)) is not None:
            return cls(examples, *shared)
        arguments = make_batch(examples, pad_token_id, packed=packed, device=device)
        row = 0 if packed else arguments["input_ids"].shape[1]
        places, start = [], 0
        for example in examples:
            places.append(slice(start, start + example.length))
            start += row or example.length
        return cls(examples, arguments, places)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens a row."""
        rows, tokens = self.arguments["input_ids"].shape
        return int(rows), int(tokens)


Call = Callable[[Any, Batch], Any]
"""Calls a model with a batch, and returns its output."""


def call_model(model: Any, batch: Batch) -> Any:
    """A plain call."""
    return model(**batch.arguments, use_cache=False)


def loss_of(model: Any, batch: Batch, call: Call = call_model) -> Tensor:
    """The loss of a batch, a scalar."""
    loss: Tensor = call(model, batch).loss
    return loss
