"""Probes: the texts that an audit asks with, read, bounded and tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..hf.families import text_config
from ..hf.positions.position_table import position_limit
from ..training import DataError, Example, TokenizedExample, describe_data, tokenize
from ..training.data import encode, vocabulary_size
from .errors import AuditError

LIMIT = 64
"""How many probes of a file are used unless somebody says more."""

MOST_CHARACTERS = 128
"""Of a token. A text with more for each position is refused before the tokenizer spends minutes on it."""


@dataclass(frozen=True)
class Probes:
    """Probes of one task, or texts of none.

    Attributes:
        name: what the page calls them.
        examples, ids: the texts and their tokens.
        digest: SHA-256 of all that were given, by which a manifest names its data too (`describe_data`).
        given: how many there were before the limit.
        are_texts: whether completions are plain continuations, so that nothing is right or wrong.
    """

    name: str
    examples: list[Example]
    ids: list[TokenizedExample]
    digest: str
    given: int
    are_texts: bool = False

    def __len__(self) -> int:
        return len(self.examples)

    def to_dict(self) -> dict[str, Any]:
        """What the report says of them."""
        return {
            "name": self.name,
            "used": len(self),
            "given": self.given,
            "tokens": sum(ids.length for ids in self.ids),
            "sha256": self.digest,
            "are_texts": self.are_texts,
        }


def prepare(
    name: str,
    examples: Sequence[Example],
    model: Any,
    tokenizer: Any,
    *,
    virtual_tokens: int,
    end: str | None,
    limit: int | None,
    are_texts: bool = False,
) -> Probes:
    """The first `limit` examples as probes; of texts of no task, those that are short enough.

    Raises:
        DataError: a text that the tokenizer cannot encode, or of more tokens than the model has positions for.
        AuditError: no example, or ids that the model's vocabulary does not have.
    """
    examples = list(examples)
    if not examples:
        raise AuditError("there is no probe: an audit needs at least one prompt with its completion")
    used = examples if limit is None else examples[:limit]
    room = most_tokens(model, virtual_tokens)
    if are_texts:
        used, ids = _that_fit(tokenizer, used, room)
    else:
        check_length(used, room)
        ids = tokenize(tokenizer, used, end=end, max_length=room)
    size = vocabulary_size(model)
    for example, tokens in zip(used, ids, strict=True):
        largest = max(tokens.prompt_ids + tokens.completion_ids)
        if largest >= size:
            raise AuditError(
                f"{example.source} has the token id {largest:,}, but the model's vocabulary has {size:,}: the "
                "tokenizer is another model's"
            )
    return Probes(name, used, ids, describe_data(examples)["sha256"], len(examples), are_texts)


def most_tokens(model: Any, virtual_tokens: int) -> int | None:
    """How many tokens a text may have beside the virtual ones; None: the model has no limit and states none."""
    stated = getattr(text_config(model), "max_position_embeddings", None)
    if not isinstance(stated, int) or stated <= 0:  # MPT has another name for it
        stated = position_limit(model)
    return None if stated is None else stated - virtual_tokens


def check_length(examples: Sequence[Example], room: int | None) -> None:
    """Raises DataError if a text cannot have as few tokens as that."""
    for example in examples:
        characters = len(example.prompt) + len(example.completion)
        if room is not None and characters > MOST_CHARACTERS * max(room, 1):
            raise DataError(
                f"{example.source}: {characters:,} characters, far more than the {room:,} tokens that the model and "
                "the virtual tokens leave room for; shorten it or leave it out"
            )


def _that_fit(
    tokenizer: Any, examples: Sequence[Example], room: int | None
) -> tuple[list[Example], list[TokenizedExample]]:
    """Texts of no task, without those that the model has no positions for."""
    both = [(example, continuation(tokenizer, example)) for example in examples]
    kept = [(example, ids) for example, ids in both if room is None or ids.length <= room]
    if not kept:
        raise AuditError(
            f"none of the built-in texts fits into the {room:,} tokens that the model and the virtual tokens leave "
            "room for; give shorter probes of another task instead"
        )
    return [example for example, _ in kept], [ids for _, ids in kept]


def continuation(tokenizer: Any, example: Example) -> TokenizedExample:
    """A text and how it goes on, with nothing put at its end."""
    prompt = encode(tokenizer, example.prompt, f"{example.source}: the prompt")
    rest = encode(tokenizer, example.completion, f"{example.source}: the completion", add_special_tokens=False)
    if not prompt or not rest:
        raise DataError(f"{example.source}: a text needs at least one token, and one that follows")
    return TokenizedExample(prompt, rest)


def check_other(own: Probes, other: Probes) -> None:
    """Raises AuditError if what is called another task holds the task's probes: its leak would be the task's effect."""
    prompts = {example.prompt for example in own.examples}
    if all(example.prompt in prompts for example in other.examples):
        raise AuditError(
            f"{other.name}: all its prompts are probes of the adapter's own task ({own.name}), so no leak could be "
            "measured on them; give probes of another task"
        )
