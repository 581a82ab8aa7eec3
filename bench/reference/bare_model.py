"""The frozen model itself, with a gradient to its input embeddings: a step that virtual tokens can hardly beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def bare_step(model: Any, batch: Mapping[str, Tensor]) -> Callable[[], None]:
    """Forward and backward down to the embeddings, as any training of virtual tokens at the input needs.

    There is nothing to optimize, so no optimizer runs.
    """
    rest = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
    embed = model.get_input_embeddings()

    def step() -> None:
        embeddings = embed(batch["input_ids"]).requires_grad_()
        model(inputs_embeds=embeddings, use_cache=False, **rest).loss.backward()

    return step
