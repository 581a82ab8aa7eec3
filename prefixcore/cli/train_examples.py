"""The examples of a training: read, split, tokenized, and what the model makes of those that are held out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .common import columns_of
from .failures import UserError, user_errors
from .limits import (
    LengthLimit,
    check_ids,
    is_too_long,
)
from .output import say, table
from .tokenizers import say_what_is_unknown

if TYPE_CHECKING:
    from ..training import Evaluation, Example, TokenizedExample


def read_examples(arguments: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and held-out ones: a file of their own, or a part of `--data` split off."""
    from ..training import read_examples as read
    from ..training import split
    from ..training.columns import USUAL

    if arguments.chat and arguments.end is not None:
        raise UserError("--end cannot be given with --chat: the model's chat template ends each turn; leave it out")
    columns = columns_of(arguments)
    if arguments.chat and columns != USUAL:
        raise UserError(
            "--prompt-column and --completion-column name texts; conversations are in messages, or conversations, so "
            "leave them out with --chat"
        )
    examples = read(arguments.data, chat=arguments.chat, columns=columns)
    if arguments.eval_data is None:
        training, held_out = split(examples, arguments.eval_fraction, arguments.split_seed)
    else:
        training, held_out = examples, read(arguments.eval_data, chat=arguments.chat, columns=columns)
        shared = {(e.prompt, e.completion) for e in training} & {(e.prompt, e.completion) for e in held_out}
        if shared:
            say(
                f"warning: {len(shared)} examples of {arguments.eval_data} are in {arguments.data} too; "
                "the evaluation will look better than it is"
            )
        prompts = {e.prompt for e in training}
        if known := sum(e.prompt in prompts and (e.prompt, e.completion) not in shared for e in held_out):
            say(
                f"warning: {known} examples of {arguments.eval_data} have a prompt of {arguments.data} and another "
                "completion, so what is learnt from one is wrong for the other"
            )
    if len(held_out) > arguments.eval_limit:
        say(f"scoring the first {arguments.eval_limit} of {len(held_out)} held-out examples (--eval-limit)")
    return training, held_out[: arguments.eval_limit]


def as_texts(arguments: argparse.Namespace, model: Any, tokenizer: Any, examples: Sequence[Example]) -> list[Example]:
    """Examples of which each is one text: some chat templates make several of a conversation.

    Raises:
        UserError: conversations are given, and the model's chat template cannot be learnt from, or refuses one.
    """
    from ..training import DataError, unroll
    from ..training.template import check_template

    if not arguments.chat:
        return list(examples)
    with user_errors(DataError, what=f"--model {arguments.model}"):
        check_template(tokenizer)
    most = LengthLimit.of(model, 0, arguments.max_length).tokens
    found: list[Example] = []
    for example in examples:
        if is_too_long(example.prompt + example.completion, most):  # refused, or left out, where its tokens are counted
            found.append(example)
            continue
        with user_errors(DataError):
            found += unroll(tokenizer, [example])
    if len(found) > len(examples):
        say(
            f"the model's chat template writes a turn otherwise once others follow: {len(examples)} conversations "
            f"became {len(found)} examples, each of one turn to learn"
        )
    return found


def tokenize_all(
    model: Any, tokenizer: Any, examples: Sequence[Example], end: str | None, limit: LengthLimit, *, skip: bool
) -> tuple[list[Example], list[TokenizedExample]]:
    """Examples and their ids; with `skip` only those that are short enough."""
    from ..training import DataError, tokenize

    kept = []
    for example in examples:
        length = f"{len(example.prompt) + len(example.completion):,} characters, more tokens"
        if not is_too_long(example.prompt + example.completion, limit.tokens):
            with user_errors(DataError):
                (ids,) = tokenize(tokenizer, [example], end=end)
            if ids.length <= limit.tokens:
                check_ids(model, ids.prompt_ids + ids.completion_ids, example.source)
                kept.append((example, ids))
                continue
            length = f"{ids.length} tokens, more"
        if not skip:
            raise UserError(f"{example.source}: {length} than the {limit}")
    if len(kept) < len(examples):
        say(f"left out {len(examples) - len(kept)} of {len(examples)} examples with more than {limit.tokens} tokens")
    texts = [(example.source, ids.prompt_ids + ids.completion_ids) for example, ids in kept]
    say_what_is_unknown(tokenizer, texts, "examples")
    return [example for example, _ in kept], [ids for _, ids in kept]


class HeldOutEvaluator:
    """Evaluates the model, as it is when called, on the held-out examples, and keeps the results by name."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        end: str | None,
        held_out: Sequence[Example],
        ids: Sequence[TokenizedExample],
        max_length: int | None,
    ) -> None:
        self.model, self.tokenizer, self.end, self.max_length = model, tokenizer, end, max_length
        self.held_out, self.ids = held_out, ids
        self.results: dict[str, Evaluation] = {}

    def __call__(self, name: str) -> None:
        from ..training import evaluate

        if self.held_out:
            with user_errors(ValueError):  # what transformers refuses, such as an end that its tokenizer cannot find
                result = evaluate(
                    self.model, self.tokenizer, self.held_out, self.ids, end=self.end, max_length=self.max_length
                )
            self.results[name] = result
            say(f"held out, {name}: loss {result.loss:.3f}, exact match {result.exact_match:.1%}")

    def table(self) -> str:
        """The results as a text table."""
        rows = [(f"{len(self.held_out)} held-out examples", "loss", "exact match")]
        for name, result in self.results.items():
            rows.append((name, f"{result.loss:.3f}", f"{result.exact_match:.1%}"))
        return table(rows)

    def to_dict(self) -> dict[str, Any]:
        """The results without the answers, for JSON."""
        return {
            name: {"loss": result.loss, "exact_match": result.exact_match, "examples": len(self.held_out)}
            for name, result in self.results.items()
        }
