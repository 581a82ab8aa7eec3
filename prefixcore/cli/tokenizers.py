"""What is said of a tokenizer with which a training is not what it looks like."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .output import say

if TYPE_CHECKING:
    from ..training import TokenizedExample

SEAM = 4
"""Tokens on either side of it."""

WORDS_END = ".,:;?!>)"
"""Behind which a space or a line break stands in most texts."""


def say_what_is_unknown(tokenizer: Any, texts: Sequence[tuple[str, Sequence[int]]], what: str) -> None:
    """A warning where the tokenizer has no token for something in texts, each named by where it is from."""
    from ..training.data import unknown_id

    unknown = unknown_id(tokenizer)
    found = [source for source, ids in texts if unknown in ids]
    if found:
        say(
            f"warning: {len(found)} of {len(texts)} {what}, the first of them {found[0]}, hold characters that the "
            f"tokenizer has no token for: the model reads {tokenizer.unk_token!r} in their place"
        )


def say_what_runs_together(tokenizer: Any, ids: Sequence[TokenizedExample]) -> None:
    """A warning where the words of prompts and completions run into one another: both stand as they are written."""
    found = [seam for each in ids if (seam := _seam(tokenizer, each))]
    if 2 * len(found) > len(ids):
        say(
            f"warning: nothing stands between prompt and completion in {len(found)} of {len(ids)} examples, such as "
            f"{found[0]!r}, as few texts have it; begin completions with a space, or end prompts with a line break"
        )


def _seam(tokenizer: Any, ids: TokenizedExample) -> str | None:
    """What stands around the place where the completion begins, if words touch there. Scripts without spaces do not."""
    before, after = ids.prompt_ids[-SEAM:], ids.completion_ids[:SEAM]
    both, alone = (str(tokenizer.decode(each, skip_special_tokens=True)) for each in (before + after, after))
    front = both.removesuffix(alone)
    touch = front[-1:].isascii() and (front[-1:].isalnum() or front[-1:] in WORDS_END)
    is_word = alone[:1].isascii() and alone[:1].isalnum()
    return both if front and both != front and touch and is_word else None


def say_what_ends(arguments: argparse.Namespace, model: Any, tokenizer: Any, ids: Sequence[TokenizedExample]) -> None:
    """A warning where nothing ends an answer, where a server would not know the end, or where prompts have one."""
    from ..training.ending import end_ids

    known, ends = end_ids(model, tokenizer, chat=False), end_ids(model, tokenizer, chat=arguments.chat)
    name = tokenizer.convert_ids_to_tokens
    learnt = ends.intersection(ids[0].answer_ids)
    if arguments.end is None and not learnt:
        why, mend = ("the chat template writes none", "")
        if not arguments.chat:
            why, mend = "the tokenizer has none", r"; give --end, such as '\n' (or '' where nothing is to end them)"
        say(
            f"warning: no token ends what is learnt, as {why}: answers go on for as long as they may, and exact match "
            f"finds few of them right{mend}"
        )
    if learnt and not learnt & known:
        mark = name(learnt.pop())
        say(
            f"warning: the chat template ends turns with {mark!r}, which neither the tokenizer nor the model's "
            "generation_config.json calls an end. prefixcore stops there; a server has to be told, by eos_token_id in "
            f"generation_config.json or stop={mark!r} in requests"
        )
    last = tokenizer("a")["input_ids"][-1:]
    if last and not arguments.chat and last != tokenizer("a", add_special_tokens=False)["input_ids"][-1:]:
        say(
            f"warning: the tokenizer puts {name(last[0])!r} behind each text, so behind prompts too, where a model has "
            "seldom seen it: completions are learnt there. add_eos_token or post_processor in the tokenizer's files "
            "decides on it"
        )
