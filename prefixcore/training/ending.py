"""Where an answer ends: at a token of the model's, of the tokenizer's, or of the chat template's."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from .data import DataError, encode
from .template import write_turns

_PROBE = "a text that is looked for"


def end_ids(model: Any, tokenizer: Any, *, chat: bool, configuration: Any = None) -> set[int]:
    """The ids at which the model's answers end: those that `generate` stops at by itself, and the tokenizer's.

    Completions end with the tokenizer's, and servers stop at it too; a model's configuration may name another.

    Args:
        model: a transformers model.
        tokenizer: the model's.
        chat: whether answers are turns of the assistant's, which `turn_end` ends as well.
        configuration: of generation; None: the model's own.
    """
    said = getattr(configuration or getattr(model, "generation_config", None), "eos_token_id", None)
    return as_ids(said) | as_ids(tokenizer.eos_token_id) | as_ids(turn_end(tokenizer) if chat else None)


def as_ids(said: Any) -> set[int]:
    """One id, several or none as a set."""
    return set() if said is None else {int(each) for each in said} if isinstance(said, Collection) else {int(said)}


def turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template ends a turn of the assistant's with; None: there is none.

    Of a base model it is often not the token that the tokenizer calls the end of a sequence.
    """
    turns = [{"role": role, "content": _PROBE} for role in ("user", "assistant")]
    try:
        text = write_turns(tokenizer, turns, "a turn", add_generation_prompt=False)
        behind = encode(tokenizer, text.rpartition(_PROBE)[2], "a turn's end", add_special_tokens=False)
    except DataError:
        return None
    special = {token for token, said in tokenizer.added_tokens_decoder.items() if said.special}
    return next((token for token in behind if token in special), None)


def before_end(ids: Sequence[int], ends: Collection[int]) -> list[int]:
    """An answer without what ends it, and without what comes behind that."""
    return list(ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))])


class Answer(NamedTuple):
    """What a model has said, without what ends it; and whether that came, or the answer was cut for its length."""

    text: str
    is_whole: bool


def answer_of(tokenizer: Any, ids: Sequence[int], ends: Collection[int], end: str | None) -> Answer:
    """An answer, without what ends it, and without what comes behind that.

    Args:
        tokenizer: the model's.
        ids: what the model has said, and what fills the row behind it.
        ends: the ids that end an answer.
        end: text that ends one, too, and may be a special token's, which texts leave out; None or "": there is none.
    """
    said = before_end(ids, ends)
    is_whole = len(said) < len(ids)
    if not end:
        return Answer(str(tokenizer.decode(said, skip_special_tokens=True)), is_whole)
    length = bisect_left(range(len(said)), True, key=lambda count: end in tokenizer.decode(said[:count]))
    text = str(tokenizer.decode(said[:length], skip_special_tokens=True)).split(end)[0]
    return Answer(text, is_whole or end in tokenizer.decode(said[:length]))
