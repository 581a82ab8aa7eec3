"""What is said or refused before work that a model cannot do, or that would never end."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .failures import UserError

MOST_VIRTUAL_TOKENS = 2**20
"""Positions taken for granted of a model that does not say how many it has."""

MOST_CHARACTERS = 128
"""Of a token. A text with more for each token that it may have is refused before minutes are spent on reading it."""


def stated_positions(model: Any) -> int | None:
    """How many positions the model says it was made for."""
    from ..hf.families import text_config

    stated = getattr(text_config(model), "max_position_embeddings", None)
    return stated if isinstance(stated, int) and stated > 0 else None


def learned_positions(model: Any) -> int | None:
    """How many positions the model can be run with; None: it computes them, without a limit."""
    from ..hf.positions.position_table import position_limit

    return position_limit(model)


@dataclass(frozen=True)
class LengthLimit:
    """The most tokens that an example may have; as text, what sets the limit and how to mend an example above it."""

    tokens: float
    text: str

    def __str__(self) -> str:
        return self.text

    @classmethod
    def of(cls, model: Any, virtual_tokens: int, max_length: int | None) -> LengthLimit:
        """The least of `max_length` and what the model has positions for.

        A `max_length` may be above what a model that computes its positions was made for.
        """
        learned, stated = learned_positions(model), stated_positions(model)
        positions = stated if learned is None and max_length is None else learned
        room = math.inf if positions is None else positions - virtual_tokens
        if max_length is not None and max_length <= room:
            return cls(max_length, f"limit of {max_length}; shorten the example or raise the limit")
        fewer = "take fewer virtual tokens (--num-virtual-tokens), " if virtual_tokens > 1 else ""
        mend = f"{fewer}shorten the example, or leave such ones out (--skip-too-long)"
        if learned is None:
            mend += ", or give --max-length if the model can read longer texts than it was made for"
        if positions is None:
            return cls(math.inf, "none")
        return cls(
            room, f"{room:,} that {virtual_tokens:,} virtual ones leave of the model's {positions:,} positions; {mend}"
        )


def is_too_long(text: str, tokens: float) -> bool:
    """Whether a text is so long that it cannot have as few tokens as that."""
    return len(text) > MOST_CHARACTERS * max(tokens, 1)


def check_virtual_tokens(model: Any, count: int) -> None:
    """Raises UserError if the virtual tokens leave no room for a text that the model was made to read."""
    most = stated_positions(model) or MOST_VIRTUAL_TOKENS
    if count >= most:
        raise UserError(
            f"{count:,} virtual tokens leave no room for an example, for the model has {most:,} positions; take fewer, "
            "or a shorter --init-text"
        )


def check_ids(model: Any, ids: Iterable[int], source: str) -> None:
    """Raises UserError if the model's table of embeddings lacks one of the ids."""
    from ..training.data import vocabulary_size

    size, largest = vocabulary_size(model), max(ids, default=0)
    if largest >= size:
        raise UserError(
            f"{source} has the token id {largest:,}, but the model's vocabulary has {size:,}: its tokenizer is "
            "another model's"
        )
