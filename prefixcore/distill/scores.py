"""How near a model's answers are to those that it gives behind the whole text, and how often they are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .divergence import divergence, tops
from .front import Reader
from .options import DistillOptions
from .running import answer, answer_logits, in_batches, said
from .targets import TOGETHER, Target
from .writing import Asked


@dataclass(frozen=True)
class Score:
    """What one way of standing in for the text comes to on held-out prompts.

    Attributes:
        tokens: that it costs in front of each prompt.
        agreement: the share of greedy answers that are the full text's, to the last token.
        token_agreement: the share of the tokens of the full text's answers that would be chosen here too, after the
            same tokens before them.
        divergence: KL(full text || this) in nats, the mean over the same tokens.
        accuracy: the share of right answers, among prompts that have one; None: none has.
        answers: what was said.

    Examples:
        >>> from prefixcore.distill import Score
        >>> Score(26, 0.5, 0.75, 0.25, None, [" Lima", " Oslo"]).agreement
        0.5
    """

    tokens: int
    agreement: float
    token_agreement: float
    divergence: float
    accuracy: float | None
    answers: list[str]


@torch.no_grad()
def score(
    reader: Reader,
    tokenizer: Any,
    targets: Sequence[Target],
    tokens: int,
    options: DistillOptions,
    padding: int,
    ids_of: Callable[[Asked], list[int]],
) -> Score:
    """Answers the prompts of `targets` greedily, and holds the answers against the teacher's.

    Args:
        reader: the model with what stands in for the text.
        tokenizer: the model's.
        targets: the held-out prompts, with the teacher's greedy answers.
        tokens: in front of each prompt.
        options: where an answer ends, and when it is right.
        padding: the id to pad with.
        ids_of: which ids of a prompt are read.
    """
    ends = options.end
    answers: list[str] = []
    for start in range(0, len(targets), TOGETHER):
        prompts = [ids_of(target.asked) for target in targets[start : start + TOGETHER]]
        found = answer(
            reader,
            tokenizer,
            prompts,
            max_new_tokens=options.max_answer_tokens,
            padding=padding,
            end=ends,
            chat=options.chat,
        )
        answers += [said(tokenizer, ids, ends) for ids in found]
    teacher = [said(tokenizer, target.answer, ends) for target in targets]
    total, chosen, count = 0.0, 0, 0
    vocabulary = reader.model.config.get_text_config().vocab_size
    for indices in in_batches([len(target.answer) for target in targets], vocabulary, most=16):
        part = [targets[i] for i in indices]
        logits = answer_logits(reader, [(ids_of(target.asked), target.answer) for target in part], padding)
        ids, log_probs = tops(part, logits.device)
        total += float(divergence(logits, ids, log_probs).sum())
        chosen += int((logits.argmax(-1) == ids[:, 0]).sum())
        count += len(ids)
    return Score(
        tokens=tokens,
        agreement=sum(a == b for a, b in zip(answers, teacher, strict=True)) / len(targets),
        token_agreement=chosen / count,
        divergence=total / count,
        accuracy=accuracy(answers, targets, options),
        answers=answers,
    )


def alone(asked: Asked) -> list[int]:
    """What a request holds."""
    return asked.alone


def of_teacher(tokenizer: Any, targets: Sequence[Target], tokens: int, options: DistillOptions) -> Score:
    """The score of the full text itself, which is what all others are held against."""
    answers = [said(tokenizer, target.answer, options.end) for target in targets]
    return Score(tokens, 1.0, 1.0, 0.0, accuracy(answers, targets, options), answers)


def accuracy(answers: Sequence[str], targets: Sequence[Target], options: DistillOptions) -> float | None:
    """The share of right answers among the prompts that have a completion; None: none has."""
    right = [
        is_right(answer, target.asked.prompt.completion, options)
        for answer, target in zip(answers, targets, strict=True)
        if target.asked.prompt.completion is not None
    ]
    return sum(right) / len(right) if right else None


def is_right(answer: str, completion: str, options: DistillOptions) -> bool:
    """Whether an answer is the completion, or holds it (`options.match`)."""
    expected = (completion.split(options.end)[0] if options.end is not None else completion).strip()
    if options.match == "exact":
        return answer.strip() == expected
    return expected.casefold() in answer.casefold()
