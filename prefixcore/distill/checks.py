"""What is refused before any work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..hf.families import text_config
from ..hf.positions.position_table import position_limit
from ..training.data import vocabulary_size
from .errors import DistillError
from .options import DistillOptions
from .writing import Prompt


def check_kinds(context: Any, options: Any, prompts: Iterable[Any]) -> None:
    """Raises TypeError for arguments of another kind than they are to be."""
    if not isinstance(context, str):
        raise TypeError(
            f"context: expected the text itself, got {type(context).__name__}; of a file: "
            'Path(file).read_text(encoding="utf-8")'
        )
    if not isinstance(options, DistillOptions):
        raise TypeError(f"options: expected DistillOptions(num_virtual_tokens=...), got {type(options).__name__}")
    for prompt in prompts:
        if not isinstance(prompt, Prompt):
            raise TypeError(
                f"prompts: expected those of read_prompts(file), or Prompt(text) for each, got {type(prompt).__name__}"
            )


def positions_of(model: Any) -> int | None:
    """How many tokens the model can read, or was made to read; None: nobody says."""
    learned = position_limit(model)
    stated = getattr(text_config(model), "max_position_embeddings", None)
    return learned if learned is not None else stated if isinstance(stated, int) and stated > 0 else None


def check_length(model: Any, front: int, rest: int, what: str) -> None:
    """Raises DistillError if the teacher cannot read so many tokens."""
    positions = positions_of(model)
    if positions is not None and front + rest > positions:
        raise DistillError(
            f"{what}: {front:,} tokens and {rest:,} behind them, with the answer, are more than the "
            f"{positions:,} positions of the model, so nobody can say how it answers there: "
            "shorten the text, the prompts or max_answer_tokens, or take a model that reads more"
        )


def check_ids(model: Any, ids: Iterable[int], what: str) -> None:
    """Raises DistillError if the model's table of embeddings lacks one of the ids."""
    size, largest = vocabulary_size(model), max(ids, default=0)
    if largest >= size:
        raise DistillError(
            f"{what} has the token id {largest:,}, but the model's vocabulary has {size:,}: the tokenizer is another "
            "model's"
        )
