"""Soft prompts that stand anywhere in the text, where special ids of the tokenizer stand for virtual tokens.

As in the templates of P-tuning (Liu et al., arXiv:2103.10385, section 3). Nothing is inserted: ids become others, so
the input keeps its length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .prompt_embeddings import embed_rows, mark_inserted
from .prompts import Prompts

IGNORED = -100


def place(model: Any, kwargs: dict[str, Any], prompts: Prompts, ids_of: list[list[int] | int], starts: bool) -> None:
    """Puts embeddings of virtual tokens where special ids stand, in place.

    Args:
        model: the model that is called.
        kwargs: the arguments of the call.
        prompts: of each row.
        ids_of: for each of `prompts.values` the ids that stand for its virtual tokens: one for each, or one for all,
            whose k-th occurrence in a row stands for the k-th virtual token.
        starts: whether the call starts sequences, so that the ids have to be there.

    Raises:
        ValueError: a row that starts without its virtual tokens, or with another number of them.
    """
    ids = kwargs.get("input_ids")
    if ids is None:
        raise ValueError(
            "this soft prompt stands where special ids are in the text (virtual_token_ids), so it needs input_ids, but "
            "the call has inputs_embeds"
        )
    embed = model.get_input_embeddings()
    size, offsets = embed.weight.shape[0], prompts.table_starts()
    new_ids, found = ids, torch.zeros_like(ids, dtype=torch.bool)
    for row_prompt, (special, start) in enumerate(zip(ids_of, offsets, strict=True)):
        rows = torch.tensor([[i == row_prompt] for i in prompts.index], device=ids.device)
        count = len(prompts.values[row_prompt])
        here, which = _occurrences(ids, special)
        here = here & rows
        if not torch.compiler.is_compiling():
            _check(here, rows, special, count, starts)
        new_ids = torch.where(here, size + start + which.to(ids.dtype), new_ids)
        found = found | here
    if not starts and not torch.compiler.is_compiling() and not bool(found.any()):
        return  # a step of generate
    if kwargs.get("labels") is not None:
        kwargs["labels"] = kwargs["labels"].masked_fill(found, IGNORED)
    kwargs["inputs_embeds"] = embed_rows(model, ids, new_ids, found, prompts)
    kwargs["input_ids"] = None
    mark_inserted(kwargs["inputs_embeds"])


def _occurrences(ids: Tensor, special: list[int] | int) -> tuple[Tensor, Tensor]:
    """Where special ids stand [B, T], and for which virtual token each does."""
    if isinstance(special, int):
        here = ids == special
        return here, (here.long().cumsum(1) - 1).clamp(min=0)
    places = torch.tensor(special, device=ids.device)
    matches = ids[:, :, None] == places
    return matches.any(-1), matches.long().argmax(-1)


def _check(here: Tensor, rows: Tensor, special: list[int] | int, count: int, starts: bool) -> None:
    """Raises ValueError for a row that does not hold what it must."""
    counts = here.sum(1)
    if isinstance(special, int):
        expected, wrong = f"{count} times", rows[:, 0] & (counts != (count if starts else 0))
    else:
        expected, wrong = "at least once", rows[:, 0] & (counts == 0) & starts
    if not bool(wrong.any()):
        return
    row = int(wrong.nonzero()[0])
    if not starts:
        raise ValueError(
            f"row {row} holds the id {special} of its virtual tokens in a later part of a sequence, where it cannot be "
            "told which of them it stands for: give virtual_token_ids an id for each, or the whole text at once"
        )
    raise ValueError(
        f"row {row} must hold {'the id' if isinstance(special, int) else 'one of the ids'} {special} of its virtual "
        f"tokens {expected}, got {int(counts[row])}"
    )
