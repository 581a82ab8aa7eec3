"""What the student is to learn: the teacher's answers and its log-probabilities, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..training.ending import end_ids
from .front import Front, Reader
from .options import DistillOptions
from .reads import Row, shared
from .running import answer, answer_logits, in_batches
from .store import Store
from .writing import Asked

TOGETHER = 32
"""Prompts that are answered at once, and kept in one file."""


@dataclass(frozen=True)
class Target:
    """One prompt with the teacher's answer.

    Attributes:
        asked: the prompt.
        answer: the ids of the teacher's answer, with what ends it, or those that are given in its place.
        top_ids: int64 [A, k], of each of its A tokens the likeliest ids.
        top_log_probs: float32 [A, k], their log-probabilities.
    """

    asked: Asked
    answer: list[int]
    top_ids: Tensor
    top_log_probs: Tensor


def whole(target: Target) -> Asked:
    """A prompt and its answer, to be gone on with from the prompt's first token.

    What a request has before the words that it shares with the teacher's prompt, such as a template's own system
    message, is given to it, and so is the first of these words.
    """
    behind, alone = target.asked.behind, target.asked.alone
    words = min(shared(Row(behind, alone)), len(behind) - 1, len(alone) - 1)
    cut = len(behind) - words
    given = (*behind[cut:], *target.answer)
    return Asked(target.asked.prompt, behind[:cut], alone[: len(alone) - words], given)


@dataclass(frozen=True)
class Teacher:
    """The model with the whole text before each prompt.

    Attributes:
        model, tokenizer: the model, with nothing attached, and its tokenizer.
        front: the text.
        digest: of the model's weights.
        padding: the id to pad with.
        options: how a text is distilled.
        store: where answers are kept.
    """

    model: Any
    tokenizer: Any
    front: Front
    digest: str
    padding: int
    options: DistillOptions
    store: Store

    def targets(
        self, prompts: Sequence[Asked], *, greedy: bool, progress: Callable[[int], object] = lambda count: None
    ) -> list[Target]:
        """The targets of prompts, all with a given answer or none; `progress` is told how many more are done."""
        temperature = 0.0 if greedy else self.options.temperature
        found = []
        with _Late(lambda: self.front.before(self.model)) as reader:
            for number, start in enumerate(range(0, len(prompts), TOGETHER)):
                part = prompts[start : start + TOGETHER]
                facts: dict[str, Any] = {
                    "model": self.digest,
                    "text": self.front.ids,
                    "prompts": [asked.behind for asked in part],
                    "end": self.options.end,
                    "ends": sorted(end_ids(self.model, self.tokenizer, chat=self.options.chat)),
                    "max_answer_tokens": self.options.max_answer_tokens,
                    "temperature": temperature,
                    "seed": self.options.seed + number if temperature else 0,
                    "top_k": self.options.top_k,
                }
                if given := [asked.given for asked in part if asked.given is not None]:
                    facts["given"] = given
                tensors = self.store.keep("answers", facts, partial(self._make, reader, part, facts))
                found += list(_unpack(part, tensors))
                progress(len(part))
        return found

    def _make(self, reading: Callable[[], Reader], part: Sequence[Asked], facts: dict[str, Any]) -> dict[str, Tensor]:
        reader, prompts = reading(), [asked.behind for asked in part]
        answers = (
            [list(ids) for ids in facts["given"]]
            if "given" in facts
            else answer(
                reader,
                self.tokenizer,
                prompts,
                max_new_tokens=self.options.max_answer_tokens,
                padding=self.padding,
                end=self.options.end,
                chat=self.options.chat,
                temperature=facts["temperature"],
                seed=facts["seed"],
            )
        )
        lengths = [len(ids) for ids in answers]
        ids, log_probs = [], []
        for indices in in_batches(lengths, self.model.config.get_text_config().vocab_size, most=16):
            with torch.no_grad():
                logits = answer_logits(reader, [(prompts[i], answers[i]) for i in indices], self.padding).float()
            top = (logits - logits.logsumexp(-1, keepdim=True)).topk(min(self.options.top_k, logits.shape[-1]))
            ids.append(top.indices.int().cpu())
            log_probs.append(top.values.cpu())
        return {
            "answers": torch.tensor([token for ids in answers for token in ids], dtype=torch.int32),
            "lengths": torch.tensor(lengths, dtype=torch.int32),
            "top_ids": torch.cat(ids),
            "top_log_probs": torch.cat(log_probs),
        }


class _Late:
    """A context that is entered when its value is first asked for: a teacher whose answers are kept need not read."""

    def __init__(self, make: Callable[[], AbstractContextManager[Reader]]) -> None:
        self._make = make
        self._context: AbstractContextManager[Reader] | None = None
        self._reader: Reader | None = None

    def __enter__(self) -> Callable[[], Reader]:
        return self._get

    def _get(self) -> Reader:
        if self._reader is None:
            self._context = self._make()
            self._reader = self._context.__enter__()
        return self._reader

    def __exit__(self, *exception: Any) -> None:
        if self._context is not None:
            self._context.__exit__(*exception)


def _unpack(part: Sequence[Asked], tensors: dict[str, Tensor]) -> Iterator[Target]:
    lengths = tensors["lengths"].tolist()
    pieces = zip(
        part,
        tensors["answers"].split(lengths),
        tensors["top_ids"].split(lengths),
        tensors["top_log_probs"].split(lengths),
        strict=True,
    )
    for asked, ids, top_ids, log_probs in pieces:
        yield Target(asked, ids.tolist(), top_ids.long(), log_probs)
