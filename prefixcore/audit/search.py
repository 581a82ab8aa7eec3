"""A small greedy search for a text of as many tokens as there are virtual ones.

It starts from the tokens that are nearest to the virtual ones and, place by place, takes whichever of the next nearest
lowers the loss on examples that are not scored. It is bounded by a number of trials, so what it finds is a candidate
and not the best text there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..training import Example, TokenizedExample, tokenize
from ..training.data import vocabulary_size
from .progress import Progress
from .scoring import losses, model_logits

TRIALS = 48
EXAMPLES = 16


def search(
    model: Any,
    tokenizer: Any,
    nearest: Sequence[Sequence[int]],
    examples: Sequence[Example],
    *,
    end: str | None,
    trials: int,
    progress: Progress,
) -> str:
    """The text that was found.

    Args:
        model: the model, with nothing attached.
        tokenizer: its tokenizer.
        nearest: for each place the ids to try, the nearest first.
        examples: what the loss is of.
        end: closes completions, as in training.
        trials: the most losses that are computed.
        progress: shows bars.
    """
    texts = tokenize(tokenizer, list(examples)[:EXAMPLES], end=end)
    vocabulary = vocabulary_size(model)
    logits = model_logits(model)

    def loss(ids: Sequence[int]) -> float:
        rows = [TokenizedExample([*ids, *text.prompt_ids], text.completion_ids) for text in texts]
        return float(losses(logits, rows, vocabulary, model.device).double().mean())

    best = [options[0] for options in nearest]
    least = loss(best)
    deepest = max(len(options) for options in nearest)
    tries = [(place, rank) for rank in range(1, deepest) for place in range(len(best)) if rank < len(nearest[place])]
    for place, rank in progress(tries[: max(0, trials - 1)], "a text, searched for"):
        tried = [*best[:place], nearest[place][rank], *best[place + 1 :]]
        with torch.no_grad():
            value = loss(tried)
        if value < least:
            best, least = tried, value
    text: str = tokenizer.decode(best)
    return text
