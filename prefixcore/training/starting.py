"""The text that virtual tokens start from, where nobody gives one: some of the training examples themselves.

Which examples matters, before training and after it: a few draws are tried, untrained, and the best is taken.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .chat import Conversation
from .data import DataError, Example, TokenizedExample, pad_id
from .evaluate import held_out_loss

NUM_VIRTUAL_TOKENS = 64
"""How many tokens the examples may fill where no number is asked for."""

FEWEST = 16
"""How many tokens an example has to leave for it, where a model has few positions."""

TRIED = 64
"""How many examples are looked at for one that fits."""

MOST_CHARACTERS = 100_000
"""Longer examples are passed over: reading one as tokens would take long, and it may be longer than the model reads."""

DRAWS = 4
"""How many texts `prefixcore train` chooses from."""

PROBES, MOST_TOKENS = 32, 2048
"""How many examples, and tokens in all, a text is tried on."""


def starting_text(
    examples: Sequence[Example],
    tokenizer: Any,
    num_virtual_tokens: int | None = None,
    *,
    end: str | None = None,
    seed: int = 0,
    most: int = NUM_VIRTUAL_TOKENS,
) -> str:
    """A text for `init_text` made of training examples, so that the untrained virtual tokens show the task already.

    Examples with different answers take turns, so that all classes of a classification are there as far as they fit.

    Args:
        examples: those to train on; held-out ones must not be among them.
        tokenizer: the model's.
        num_virtual_tokens: how many tokens the text is to fill; the end of a further example is put before the whole
            ones to fill it. None: as many as whole examples need, at most `most`.
        end: text that closes every completion, as in `tokenize`.
        seed: which examples.
        most: how many tokens whole examples may fill where `num_virtual_tokens` is None.

    Returns:
        The examples one after the other, as the model reads them in training; empty where all are too long to be read
        for this.

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
    budget = most if num_virtual_tokens is None else num_virtual_tokens
    around = list(tokenizer("")["input_ids"])  # what the tokenizer puts around any text, once for the whole of it
    budget -= len(around)
    whole: list[list[int]] = []
    left_out: list[list[int]] = []
    shorter = [each for each in examples if len(each.prompt) + len(each.answer) <= MOST_CHARACTERS]
    for count, example in enumerate(in_turns(shorter, seed)):
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


def most_tokens(positions: int, lengths: Iterable[int]) -> int:
    """How many tokens a text of examples may fill on a model of so many positions, for `starting_text`.

    At most 64, at most half of the positions, and no more than the longest example leaves, unless it leaves fewer than
    16: it is then to be refused, or left out, and does not make a poor start for all the others.

    Args:
        positions: how many the model has.
        lengths: how many tokens the examples have that are to be read behind the text.

    Examples:
        >>> from prefixcore.training.starting import most_tokens
        >>> most_tokens(2048, [30, 400]), most_tokens(128, [30, 100]), most_tokens(96, [30])
        (64, 28, 48)
    """
    most = min(NUM_VIRTUAL_TOKENS, positions // 2)
    left = positions - max(lengths, default=0)
    return max(1, min(most, left) if left >= FEWEST else most)


def best_start(model: Any, tokenizer: Any, configs: Sequence[Any], examples: Sequence[TokenizedExample]) -> Any:
    """The configuration whose virtual tokens, before any training, have the least loss on the first examples.

    On at most 32 examples and 2,048 tokens, so that a configuration takes about as long as two steps of training.

    Args:
        model: the model to train, with nothing attached; it is left as it is.
        tokenizer: the model's.
        configs: those to choose from, such as the same one with several texts.
        examples: training examples, in a random order; best such as are in none of the texts.

    Returns:
        One of `configs`; the first where there is nothing to choose, or no loss is a number.

    Examples:
        >>> from prefixcore.training import Example, best_start, starting_text, tokenize
        >>> examples = [Example(f"{a}{b} ->", f" {b}{a}") for a in "abc" for b in "xyz"]
        >>> texts = [starting_text(examples, tokenizer, end=".", seed=seed) for seed in range(4)]
        >>> configs = [prefixcore.PrefixTuningConfig(init_text=text) for text in texts]
        >>> best = best_start(model, tokenizer, configs, tokenize(tokenizer, examples, end="."))
        >>> best in configs
        True
    """
    from ..hf import attach

    probes: list[TokenizedExample] = []
    for example in examples[:PROBES]:
        if probes and sum(each.length for each in probes) + example.length > MOST_TOKENS:
            break
        probes.append(example)
    if len(configs) < 2 or not probes:
        return configs[0]
    losses = []
    for config in configs:
        with attach(model, config, tokenizer=tokenizer) as handle:
            loss = held_out_loss(handle.model, probes, pad_id(tokenizer, model), packed=handle.can_pack)
        losses.append(loss if loss == loss else float("inf"))
    return configs[losses.index(min(losses))]


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


def beginning(example: Example, ids: TokenizedExample, tokenizer: Any) -> str:
    """How the example begins in a text that it is part of: as it does in the data, or as its template writes it."""
    if not isinstance(example, Conversation):
        return example.prompt
    asked = ids_of(TokenizedExample(ids.prompt_ids, []), list(tokenizer("")["input_ids"]))
    return str(tokenizer.decode(asked, clean_up_tokenization_spaces=False))


def ids_of(example: TokenizedExample, around: list[int]) -> list[int]:
    """All tokens of an example but the one that begins every text."""
    ids = example.prompt_ids + example.completion_ids
    return ids[1:] if around and ids[0] == around[0] else ids
