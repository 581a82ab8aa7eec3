"""Examples: split, tokenised, collated with labels on the completion only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

_Item = TypeVar("_Item")

IGNORED = -100
"""The label that transformers' loss leaves out."""


class DataError(ValueError):
    """The training data cannot be used; the message names the file, the line and the field.

    Examples:
        >>> from prefixcore.training import DataError, read_jsonl
        >>> try:
        ...     read_jsonl("nowhere.jsonl")
        ... except DataError as error:
        ...     print(error)
        nowhere.jsonl: no such file; expected JSON lines with the fields prompt and completion
    """


@dataclass(frozen=True)
class Example:
    """The model is to continue `prompt` with `completion`; `source` says where the example is from, for messages.

    Examples:
        >>> from prefixcore.training import Example
        >>> Example("Portugal ->", " Lisbon").completion
        ' Lisbon'
    """

    prompt: str
    completion: str
    source: str = "example"

    @property
    def answer(self) -> str:
        """The text that the model is to give by itself."""
        return self.completion

    def expected(self, tokenizer: Any, ids: TokenizedExample) -> str:
        """`answer` as it is decoded from what the model says, where the example has these ids.

        A tokenizer may write a text otherwise, in lower case for one. What it has no token for cannot be said at all:
        such an answer, and one of special tokens alone, which are left out of answers, stays as it is written.
        """
        said = str(tokenizer.decode(ids.answer_ids, skip_special_tokens=True))
        is_sayable = said.strip() and unknown_id(tokenizer) not in ids.answer_ids
        return said if is_sayable else self.answer

    def to_ids(self, tokenizer: Any, end: str | None) -> TokenizedExample:
        """Token ids, as `tokenize` makes them."""
        where, completion = f"{self.source}: the completion", self.completion
        if end:
            said = completion
            while said.endswith(end):
                said = said.removesuffix(end)
            if end in said:
                raise DataError(
                    f"{where} goes on behind {end!r}, where an answer ends; take another end, or none, or leave "
                    "that text out of it"
                )
            completion = completion if completion.endswith(end) else completion + end
        prompt_ids = encode(tokenizer, self.prompt, f"{self.source}: the prompt")
        completion_ids = encode(tokenizer, completion, where, add_special_tokens=False)
        stop = tokenizer.eos_token_id
        if stop is not None and stop in completion_ids[:-1]:
            raise DataError(
                f"{where} goes on behind {tokenizer.eos_token!r}, where the model stops; leave that token out of it"
            )
        if end is None and stop is not None and completion_ids[-1:] != [stop]:
            completion_ids.append(stop)
        if not prompt_ids:
            raise DataError(f"{self.source}: the prompt has no token; there is nothing to continue from")
        if not completion_ids:
            raise DataError(f"{where} has no token; there is nothing to learn from it")
        return TokenizedExample(prompt_ids, completion_ids)


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids of an `Example`: `prompt_ids`, which are only read, and `completion_ids`, which are learnt.

    Attributes:
        prompt_ids: what stands before the first token to learn.
        completion_ids: the rest.
        learnt: which of `completion_ids` are learnt, where others' turns stand between them; None: all of them.

    Examples:
        >>> from prefixcore.training import TokenizedExample
        >>> TokenizedExample(prompt_ids=[5, 6], completion_ids=[7]).length
        3
        >>> TokenizedExample([5, 6], [7, 8, 9], learnt=[True, False, True]).labels
        [-100, -100, 7, -100, 9]
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    learnt: list[bool] | None = None

    @property
    def length(self) -> int:
        """How many tokens it has in all."""
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def labels(self) -> list[int]:
        """One for each token: its id, or `IGNORED`."""
        learnt = [True] * len(self.completion_ids) if self.learnt is None else self.learnt
        after = [token if is_learnt else IGNORED for token, is_learnt in zip(self.completion_ids, learnt, strict=True)]
        return [IGNORED] * len(self.prompt_ids) + after

    @property
    def question_ids(self) -> list[int]:
        """What stands before the last run of learnt tokens: what the model is asked for its answer with."""
        ids = self.prompt_ids + self.completion_ids
        return ids if not self.completion_ids else ids[: len(ids) - len(self.answer_ids)]

    @property
    def answer_ids(self) -> list[int]:
        """The last run of learnt tokens."""
        if self.learnt is None or all(self.learnt):
            return self.completion_ids
        return self.completion_ids[len(self.learnt) - self.learnt[::-1].index(False) :]


def split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Shuffle by `seed` and set `fraction` of the examples aside: `(training, held out)`.

    Examples with the same prompt stay on one side, so that nothing held out is ever trained on. A
    fraction above 0 holds out at least one prompt and leaves at least one.

    Raises:
        DataError: the fraction is not in [0, 1), or there are too few different prompts to split.

    Examples:
        >>> from prefixcore.training import Example, split
        >>> examples = [Example(f"{n} + 1 =", f" {n + 1}") for n in range(10)]
        >>> training, held_out = split(examples, 0.2, seed=0)
        >>> len(training), len(held_out)
        (8, 2)
    """
    if not 0 <= fraction < 1:
        raise DataError(f"the held-out fraction must be at least 0 and below 1, got {fraction}")
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.prompt, []).append(example)
    if fraction == 0:
        return list(examples), []
    if len(groups) < 2:
        raise DataError(
            f"{len(examples)} examples have {len(groups)} different prompts, too few to hold any out; "
            "give more data, a held-out file of its own, or a held-out fraction of 0"
        )
    return set_aside(list(groups.values()), fraction, seed)


def set_aside(groups: Sequence[Sequence[_Item]], fraction: float, seed: int) -> tuple[list[_Item], list[_Item]]:
    """Some of at least two groups, at least one of them and never all: `(the others, those set aside)`."""
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    aside = min(max(1, round(fraction * len(groups))), len(groups) - 1)
    return [x for i in order[aside:] for x in groups[i]], [x for i in order[:aside] for x in groups[i]]


def is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def encode(tokenizer: Any, text: str, source: str, **options: Any) -> list[int]:
    """The ids of a text; DataError, which begins with `source`: the tokenizer has none for it."""
    if not is_whole(text):
        raise DataError(f"{source} holds bytes that are not UTF-8, or half of a character (a lone surrogate)")
    try:
        return list(tokenizer(text, **options)["input_ids"])
    except MemoryError:
        raise
    except Exception as error:  # what the tokenizers library raises is an Exception and nothing narrower
        raise DataError(f"{source} cannot be encoded by the tokenizer: {error}") from error


def tokenize(
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    end: str | None = None,
    max_length: int | None = None,
) -> list[TokenizedExample]:
    """Turn text into ids. Prompt and completion are tokenised apart, as they are when generating.

    A conversation (`read_examples(..., chat=True)`) is written by the model's chat template, and only the assistant's
    turns are learnt. Where the template does not write it as one text, `unroll` makes several of it before.

    Args:
        tokenizer: a transformers tokenizer; its own rule decides on special tokens before the prompt.
        examples: what to tokenise.
        end: text that closes every completion, added where it is not there yet; None: the tokenizer's
            end-of-sequence token, if it has one.
        max_length: the most tokens an example may have, or None for no limit.

    Raises:
        DataError: an example has text that the tokenizer cannot encode, no prompt token, no completion token, one that
            goes on where an answer ends, or too many tokens in all.

    Examples:
        >>> from prefixcore.training import Example, tokenize
        >>> [tokenized] = tokenize(tokenizer, [Example("Peru ->", " Lima")], end=".")
        >>> tokenizer.decode(tokenized.completion_ids)
        ' Lima.'
    """
    tokenized = []
    for example in examples:
        ids = example.to_ids(tokenizer, end)
        if max_length is not None and ids.length > max_length:
            raise DataError(
                f"{example.source}: {ids.length} tokens, more than the limit of {max_length}; "
                "shorten the example or raise the limit"
            )
        tokenized.append(ids)
    return tokenized


def collate(examples: Sequence[TokenizedExample], pad_token_id: int, *, side: str = "right") -> dict[str, torch.Tensor]:
    """Pad examples into one batch, on the `side` "right" (to train) or "left" (to generate).

    Returns:
        `input_ids`, `attention_mask` (1 = token, 0 = padding) and `labels`, each int64 `[B, T]`; labels
        are `IGNORED` on prompt and padding.

    Examples:
        >>> from prefixcore.training import TokenizedExample, collate
        >>> batch = collate([TokenizedExample([5, 6], [7]), TokenizedExample([8], [9])], pad_token_id=0)
        >>> batch["input_ids"]
        tensor([[5, 6, 7],
                [8, 9, 0]])
        >>> batch["labels"]
        tensor([[-100, -100,    7],
                [-100,    9, -100]])
    """
    longest = max(example.length for example in examples)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for example in examples:
        padding = longest - example.length
        for name, values, filler in (
            ("input_ids", example.prompt_ids + example.completion_ids, pad_token_id),
            ("attention_mask", [1] * example.length, 0),
            ("labels", example.labels, IGNORED),
        ):
            fill = [filler] * padding
            columns[name].append(fill + values if side == "left" else values + fill)
    return {name: torch.tensor(values) for name, values in columns.items()}


def pack(examples: Sequence[TokenizedExample]) -> dict[str, Any]:
    """Put examples end to end into one batch without padding: what `prefixcore.PackedCollator` makes of them."""
    from ..hf import PackedCollator

    return PackedCollator()(
        [
            {
                "input_ids": example.prompt_ids + example.completion_ids,
                "labels": example.labels,
            }
            for example in examples
        ]
    )


def make_batch(
    examples: Sequence[TokenizedExample], pad_token_id: int, *, packed: bool, device: torch.device
) -> dict[str, Any]:
    """Examples as arguments for a model on `device`, packed or padded on the right."""
    batch = pack(examples) if packed else collate(examples, pad_token_id)
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def batches(examples: Sequence[TokenizedExample], batch_size: int, seed: int) -> Iterator[list[TokenizedExample]]:
    """Yield the examples of one step after another, without end: a new order each epoch, the short last batch kept."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order), batch_size):
            yield [examples[i] for i in order[start : start + batch_size]]


def pad_id(tokenizer: Any, model: Any = None) -> int:
    """The id to pad with: the tokenizer's, else its end of sequence, else 0 (padding is masked anyway).

    With a model, only an id that its table of embeddings has.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None and candidate < vocabulary_size(model):
            return int(candidate)
    return 0


def unknown_id(tokenizer: Any) -> int | None:
    """The id that stands for what the tokenizer has no token for; None: it has one for every text.

    GPT-2's names one that it never writes, which is also its end of a sequence.
    """
    unknown = tokenizer.unk_token_id
    return None if unknown is None or unknown == tokenizer.eos_token_id else int(unknown)


def vocabulary_size(model: Any) -> float:
    """How many token ids the model's table of embeddings has; infinity where there is no table to ask."""
    find = getattr(model, "get_input_embeddings", None)
    weight = None if find is None else getattr(find(), "weight", None)
    return math.inf if weight is None else int(weight.shape[0])
