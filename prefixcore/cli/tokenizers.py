"""What is said of a tokenizer with which a training is not what it looks like."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .output import say

if TYPE_CHECKING:
    from ..training import TokenizedExample


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
    if not arguments.chat and last != tokenizer("a", add_special_tokens=False)["input_ids"][-1:]:
        say(
            f"warning: the tokenizer puts {name(last[0])!r} behind each text, so behind prompts too, where a model has "
            "seldom seen it: completions are learnt there. add_eos_token or post_processor in the tokenizer's files "
            "decides on it"
        )
