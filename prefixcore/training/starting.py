"""The text that virtual tokens start from, where nobody gives one: some of the training examples themselves."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from .data import DataError, Example, TokenizedExample

NUM_VIRTUAL_TOKENS = 32
"""How many tokens the examples may fill where no number is asked for."""

TRIED = 64
"""How many examples are looked at for one that fits."""


def starting_text(
    examples: Sequence[Example],
    tokenizer: Any,
    num_virtual_tokens: int | None = None,
    *,
    end: str | None = None,
    seed: int = 0,
) -> str:
    """A text for `init_text` made of training examples, so that the untrained virtual tokens show the task already.

    Examples with different answers take turns, so that all classes of a classification are there as far as they fit.

    Args:
        examples: those to train on; held-out ones must not be among them.
        tokenizer: the model's.
        num_virtual_tokens: how many tokens the text is to fill; the end of a further example is put before the whole
            ones to fill it. None: as many as whole examples need, at most 32.
        end: text that closes every completion, as in `tokenize`.
        seed: which examples.

    Returns:
        The examples one after the other, as the model reads them in training.

    Raises:
        DataError: there is no example, or one has no text that the tokenizer can encode.

    Examples:
        >>> from prefixcore.training import Example, starting_text
        >>> examples = [Example("Peru ->", " Lima"), Example("Norway ->", " Oslo")]
        >>> starting_text(examples, tokenizer, end=".")
        'Norway -> Oslo.Peru -> Lima.'
    """
    if not examples:
        raise DataError("no examples to start from")
    budget = NUM_VIRTUAL_TOKENS if num_virtual_tokens is None else num_virtual_tokens
    around = list(tokenizer("")["input_ids"])  # what the tokenizer puts around any text, once for the whole of it
    budget -= len(around)
    whole: list[list[int]] = []
    left_out: list[list[int]] = []
    for count, example in enumerate(in_turns(examples, seed)):
        ids = ids_of(example.to_ids(tokenizer, end), around)
        if len(ids) <= budget - sum(map(len, whole)):
            whole.append(ids)
        else:
            left_out.append(ids)
        if count + 1 >= TRIED or sum(map(len, whole)) >= budget:
            break
    room = budget - sum(map(len, whole))
    if room > 0 and left_out and (num_virtual_tokens is not None or not whole):
        whole.insert(0, min(left_out, key=len)[-room:])
    return tokenizer.decode([token for ids in whole for token in ids], clean_up_tokenization_spaces=False)


def in_turns(examples: Sequence[Example], seed: int) -> Iterator[Example]:
    """Examples in a random order in which those with different answers take turns."""
    order = random.Random(seed)
    answers: dict[str, list[Example]] = {}
    for example in order.sample(list(examples), len(examples)):
        answers.setdefault(example.answer.strip(), []).append(example)
    while answers:
        for answer in list(answers):
            yield answers[answer].pop()
            if not answers[answer]:
                del answers[answer]


def ids_of(example: TokenizedExample, around: list[int]) -> list[int]:
    """All tokens of an example but the one that begins every text."""
    ids = example.prompt_ids + example.completion_ids
    return ids[1:] if around and ids[0] == around[0] else ids
