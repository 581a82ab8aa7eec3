"""Held-out evaluation: the loss of the right answer, and whether the model gives it by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .batch import Batch, Call, call_model, loss_of
from .causal import TO_ANSWER, TO_LEARN, check_causal
from .chat import Conversation
from .data import IGNORED, DataError, Example, TokenizedExample, collate, pad_id
from .ending import Answer, answer_of, as_ids, end_ids
from .questions import Question


@dataclass(frozen=True)
class Evaluation:
    """How a model does on held-out examples.

    Attributes:
        loss: nats per completion token.
        exact_match: the share of right answers, 0 to 1, white space around them aside.
        answers: what the model said, one for each example.

    Examples:
        >>> from prefixcore.training import Evaluation
        >>> Evaluation(loss=0.9, exact_match=0.5, answers=[" Lima", " Bergen"]).exact_match
        0.5
    """

    loss: float
    exact_match: float
    answers: list[str]


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[torch.device]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


def held_out_loss(
    model: nn.Module,
    examples: Sequence[TokenizedExample],
    pad_token_id: int,
    *,
    batch_size: int = 16,
    packed: bool = False,
    sharing_width: int = 0,
    call: Call = call_model,
) -> float:
    """Mean loss in nats over every completion token of `examples`, each token counting the same.

    Args:
        model: a transformers causal language model, with or without virtual tokens.
        examples: from `tokenize`.
        pad_token_id: fills short batch rows.
        batch_size: examples at once.
        packed: give the model packed batches, as in `fit`: the same loss but for rounding.
        sharing_width: as in `fit`.
        call: calls the model with a batch.

    Raises:
        ValueError: no example has a token to predict, or `batch_size` is below 1.

    Examples:
        >>> from prefixcore.training import Example, held_out_loss, tokenize
        >>> held_out = tokenize(tokenizer, [Example("Peru ->", " Lima")])
        >>> loss = held_out_loss(model, held_out, pad_token_id=0)
        >>> 4 < loss < 5  # of random weights: about the logarithm of the 97 tokens that there are
        True
    """
    check_causal(model, TO_LEARN)
    total, tokens = 0.0, 0
    with _in_eval_mode(model) as device:
        for start in _starts(len(examples), batch_size):
            batch = Batch.of(
                examples[start : start + batch_size],
                pad_token_id,
                packed=packed,
                device=device,
                sharing_width=sharing_width,
            )
            # A model predicts from the token before: a label on the very first token is never scored.
            count = int((batch.arguments["labels"][:, 1:] != IGNORED).sum())
            total += float(loss_of(model, batch, call)) * count
            tokens += count
    if not tokens:
        raise ValueError(f"none of {len(examples)} examples has a token to predict: a completion behind a first token")
    return total / tokens


def predict(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | Question],
    *,
    max_new_tokens: int,
    end: str | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
    chat: bool = False,
    **generate_options: Any,
) -> list[str]:
    """Continue each prompt, greedily unless `generate_options` say otherwise, in left-padded batches.

    Args:
        model: a transformers causal language model, with or without virtual tokens.
        tokenizer: the model's.
        prompts: texts, tokenised as in training; or questions (`read_questions`), which may be conversations.
        max_new_tokens: the most tokens to add.
        end: text at which the answer is cut (and generation stops); None: the end-of-sequence token.
        batch_size: prompts at once.
        max_length: the most tokens that a prompt and its answer may have in all; answers end there.
        chat: each text is what a user says, written by the model's chat template.

    Returns:
        The text after each prompt, without `end`.

    Raises:
        DataError: a prompt that the tokenizer cannot encode, or without a token, or that leaves no room for an answer.

    Examples:
        >>> from prefixcore.training import predict
        >>> answers = predict(model, tokenizer, ["Peru ->", "Norway ->"], max_new_tokens=4)
        >>> len(answers)
        2
    """
    found = answers_to(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        end=end,
        batch_size=batch_size,
        max_length=max_length,
        chat=chat,
        **generate_options,
    )
    return [answer.text for answer in found]


def answers_to(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | Question],
    *,
    max_new_tokens: int,
    end: str | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
    chat: bool = False,
    **generate_options: Any,
) -> list[Answer]:
    """What `predict` returns, and whether each answer is whole."""
    options: dict[str, Any] = {"do_sample": False, **generate_options}
    asked = [
        prompt if isinstance(prompt, Question) else Question(prompt, source=f"prompt {number}")
        for number, prompt in enumerate(prompts, start=1)
    ]
    ids = [question.ids(tokenizer, chat=chat) for question in asked]
    is_chat = chat or any(not isinstance(question.prompt, str) for question in asked)
    return _continue(model, tokenizer, ids, max_new_tokens, end, batch_size, max_length, options, chat=is_chat)


def _continue(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    end: str | None,
    batch_size: int,
    max_length: int | None,
    options: dict[str, Any],
    *,
    chat: bool,
) -> list[Answer]:
    check_causal(model, TO_ANSWER)
    padding = pad_id(tokenizer, model)
    ends = end_ids(model, tokenizer, chat=chat, configuration=options.get("generation_config"))
    if "eos_token_id" in options:
        ends = as_ids(options["eos_token_id"])
    elif ends:
        options = {**options, "eos_token_id": sorted(ends)}
    if end:
        options = {**options, "stop_strings": [end], "tokenizer": tokenizer}
    answers: dict[int, Answer] = {}
    with _in_eval_mode(model) as device:
        for start in _starts(len(prompts), batch_size):
            rows = {start + i: TokenizedExample(ids, []) for i, ids in enumerate(prompts[start : start + batch_size])}
            for indices, room in _by_room(rows, max_new_tokens, max_length):
                batch = collate([rows[index] for index in indices], padding, side="left")
                prompt_length = batch["input_ids"].shape[1]
                generated = model.generate(  # type: ignore[operator]
                    input_ids=batch["input_ids"].to(device),
                    attention_mask=batch["attention_mask"].to(device),
                    max_new_tokens=room,
                    pad_token_id=padding,
                    **options,
                )
                for index, ids in zip(indices, generated[:, prompt_length:].tolist(), strict=True):
                    answers[index] = answer_of(tokenizer, ids, ends, end)
    return [answers[index] for index in range(len(prompts))]


def _starts(count: int, batch_size: int) -> range:
    """Where batches begin; ValueError: they would never come to an end, or to nothing."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return range(0, count, batch_size)


def _by_room(
    rows: Mapping[int, TokenizedExample], max_new_tokens: int, max_length: int | None
) -> Iterator[tuple[list[int], int]]:
    """Rows to generate together, and how many tokens: those with room for all of them, then the others alone."""
    limit = math.inf if max_length is None else max_length
    whole = [index for index, row in rows.items() if row.length + max_new_tokens <= limit]
    if whole:
        yield whole, max_new_tokens
    for index, row in rows.items():
        if row.length + max_new_tokens > limit:
            room = int(limit) - row.length
            if room < 1:
                raise DataError(f"prompt {index + 1}: {row.length:,} tokens; at most {int(limit) - 1:,} leave room")
            yield [index], room


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    tokenized: Sequence[TokenizedExample],
    *,
    end: str | None = None,
    max_length: int | None = None,
) -> Evaluation:
    """Held-out loss and greedy exact match.

    Of a conversation, the answer is the assistant's last turn as the model's chat template writes it, calls of tools
    among it. An answer may be one token longer than the longest right one: a longer answer cannot be right.

    Args:
        model: a transformers causal language model, with or without virtual tokens.
        tokenizer: the model's.
        examples: held-out ones.
        tokenized: the same ones, from `tokenize`.
        end: text at which an answer is cut, as `tokenize` was told; None: the end-of-sequence token.
        max_length: the most tokens that a prompt and its answer may have in all; answers end there.

    Raises:
        ValueError: no examples, or none with a token to predict.
        DataError: a prompt that leaves no room for an answer.

    Examples:
        >>> from prefixcore.training import Example, evaluate, tokenize
        >>> examples = [Example("Peru ->", " Lima")]
        >>> evaluate(model, tokenizer, examples, tokenize(tokenizer, examples)).exact_match
        0.0
    """
    if not tokenized:
        raise ValueError("no examples to evaluate on")
    longest = max(len(example.answer_ids) for example in tokenized)
    prompts = [example.question_ids for example in tokenized]
    is_chat = any(isinstance(example, Conversation) for example in examples)
    options = {"do_sample": False}
    found = _continue(model, tokenizer, prompts, longest + 1, end, 64, max_length, options, chat=is_chat)
    answers = [answer.text for answer in found]
    return Evaluation(
        loss=held_out_loss(model, tokenized, pad_id(tokenizer, model)),
        exact_match=exact_match(answers, as_decoded(tokenizer, examples, tokenized), end),
        answers=answers,
    )


def as_decoded(tokenizer: Any, examples: Sequence[Example], tokenized: Sequence[TokenizedExample]) -> list[Example]:
    """Examples with their right answers as they are decoded from what a model says."""
    return [
        Example(example.prompt, example.expected(tokenizer, ids), example.source)
        for example, ids in zip(examples, tokenized, strict=True)
    ]


def exact_match(answers: Sequence[str], examples: Sequence[Example], end: str | None = None) -> float:
    """Share of `answers` equal to their example's own, white space around both aside."""
    num_right = sum(is_right(answer, example, end) for answer, example in zip(answers, examples, strict=True))
    return num_right / len(examples)


def is_right(answer: str, example: Example, end: str | None = None) -> bool:
    """Whether `answer` is the example's (cut at `end`), white space around both aside."""
    expected = example.answer.split(end)[0] if end else example.answer
    return answer.strip() == expected.strip()
