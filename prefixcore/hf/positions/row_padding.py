"""Whether padding on the left changes what a model computes, which rows with soft prompts of different lengths have.

Some models count positions with the padding (Bart, Pegasus), or from another number than 0 (RoBERTa), or have states
that padding passes through (RecurrentGemma).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..attention.patch import frozen_run
from ..families import is_known
from .model_inputs import has_axes, plain_ids
from .position_table import first_position

if TYPE_CHECKING:
    from ..bank.bank import Bank

_COUNT, _PADDING = 4, 3


def check_rows_may_differ(bank: Bank) -> None:
    """Raises NotImplementedError if rows with soft prompts of different lengths would not be what they are alone."""
    if bank.moves_with_padding is None:
        bank.moves_with_padding = not is_known(bank.model) and _moves_with_padding(bank)
    if bank.moves_with_padding:
        raise NotImplementedError(
            f"{type(bank.model).__name__} computes something else where padding comes before a text, which rows with "
            "soft prompts of different lengths need: give all rows of a batch soft prompts of one length"
        )


def _moves_with_padding(bank: Bank) -> bool:
    model: Any = bank.model if bank.encoder is None else bank.encoder
    ids = plain_ids(model, _COUNT)
    padded = torch.cat((ids[:, :1].expand(-1, _PADDING), ids), 1)
    mask = torch.ones_like(padded)
    mask[:, :_PADDING] = 0
    inputs = {"input_ids": padded, "attention_mask": mask, "use_cache": False}
    if "position_ids" in bank.names[model] and not has_axes(model):
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) + first_position(model)
    with bank.disabled(), frozen_run(model):
        alone = model(input_ids=ids, use_cache=False)[0].float()
        moved = model(**inputs)[0].float()
    if alone.dim() != 3:
        return False
    difference = (moved[:, _PADDING:] - alone).abs().max()
    return bool(difference > 1e-2 * alone.abs().max().clamp(min=1e-6))
