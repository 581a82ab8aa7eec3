"""Self-study: prompts that the model asks itself about parts of the text (Cartridges, arXiv:2506.06266).

In plain text the model is asked, by its chat template where it has one, for lists of questions about a part of the
text; it goes on behind such a part with lines of its own, which are cut at a random token and so become prompts; and
lines of the text itself, cut in the same way, ask it to go on with what it has read. In conversations it writes the
user's turn itself, behind the text as the system message (as Magpie does, arXiv:2406.08464).
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..training.chat import question_ids
from ..training.data import DataError
from ..training.ending import end_ids
from .checks import positions_of
from .front import Front
from .options import DistillOptions
from .running import answer
from .store import Store
from .writing import Plain, Prompt, writer

TOGETHER = 32
"""Prompts that are made at once, about one part of the text."""

MOST_TOKENS = 40
"""Of a prompt that the model makes."""

TOP_P = 0.95

LISTS, LIST_TOKENS = 4, 160
"""Lists of questions that are made at once, some ten questions in each, and the tokens of one."""

OF_LISTS = 0.7
"""The temperature of lists: at 1 a small model asks about other things than the text."""

LIST_REQUEST = "Write ten short questions about details of this text."
LIST_HEADING = "Questions about this text:"
FIRST_NUMBER = "1."
"""What begins a list of questions: asked for in a conversation, or in plain text, and its first number."""

NUMBER = re.compile(r"^(?:\d+[.):]|[-*])\s*")
"""What stands before a question of a list."""

ASKING = (("Q:", "\nA:"), ("Question:", "\nAnswer:"))
"""What is put before a question, and behind it to get an answer."""


@dataclass(frozen=True)
class SelfStudy:
    """Makes prompts about a text.

    Attributes:
        model, tokenizer: the model, with nothing attached, and its tokenizer.
        text: the whole.
        digest: of the model's weights.
        padding: the id to pad with.
        options: how many prompts, and how they end.
        store: where they are kept.
    """

    model: Any
    tokenizer: Any
    text: str
    digest: str
    padding: int
    options: DistillOptions
    store: Store

    def prompts(self, progress: Callable[[int], object] = lambda count: None) -> list[Prompt]:
        """About `options.questions` different prompts; `progress` is told how many more were made."""
        found: dict[str, Prompt] = {}
        positions = positions_of(self.model)
        most = self.options.part
        if positions is not None:  # behind a part there is to be room for what asks for a prompt, and for the prompt
            most = max(1, min(most, positions - 2 * MOST_TOKENS))
        chunks = chunks_of(self.tokenizer, self.text, most)
        kinds = [self._questions, self._lines, self._questions, self._quotes]
        if self.options.chat:
            kinds = [self._users]
        wanted = self.options.questions
        for number in range(4 * -(-wanted // TOGETHER)):  # some come twice, and some are empty
            if len(found) >= wanted:
                break
            before = len(found)
            # Each part meets each kind, however many parts there are.
            turn, part = divmod(number, len(chunks))
            kind = kinds[(turn + part) % len(kinds)]
            for text in self._round(kind, chunks[part], self.options.seed + number):
                if len(found) < wanted:
                    found.setdefault(text, Prompt(text, None, f"question {len(found) + 1}"))
            progress(len(found) - before)
        return list(found.values())

    def _round(self, kind: Callable[[str, int], list[str]], chunk: str, seed: int) -> list[str]:
        """The prompts of one batch."""
        if kind == self._quotes:
            return self._quotes(chunk, seed)
        facts = {
            "model": self.digest,
            "chunk": chunk,
            "chat": self.options.chat,
            "asked": [] if self.options.chat else self._list_front(chunk),
            "kind": kind.__name__,
            "ends_line": self.text.endswith("\n"),  # of the whole text: how a question behind it begins
            "front": writer(self.tokenizer, chunk, chat=self.options.chat).front,
            "ends": sorted(end_ids(self.model, self.tokenizer, chat=self.options.chat)),
            "seed": seed,
            "together": [TOGETHER, LISTS],
            "tokens": [MOST_TOKENS, LIST_TOKENS],
        }
        kept = self.store.keep("questions", facts, lambda: _pack(kind(chunk, seed)))
        return [text for text in _unpack(kept) if text.strip()]

    def _users(self, chunk: str, seed: int) -> list[str]:
        """A user's turns, which the model writes itself behind the text."""
        written = writer(self.tokenizer, chunk, chat=True)
        return self._sample(written.front, [[]] * TOGETHER, seed, None)

    def _lines(self, chunk: str, seed: int) -> list[str]:
        """Lines with which the model goes on, each cut at a random token."""
        ids = Plain(self.tokenizer, chunk.rstrip() + "\n").front
        lines = self._sample(ids, [[]] * TOGETHER, seed, "\n")
        return cut_somewhere(self.tokenizer, lines, seed)

    def _quotes(self, chunk: str, seed: int) -> list[str]:
        """Lines of the text itself, each cut at a random token."""
        lines = [line for line in chunk.splitlines() if line.strip()]
        chosen = random.Random(seed).choices(lines, k=TOGETHER)
        return cut_somewhere(self.tokenizer, chosen, seed)

    def _questions(self, chunk: str, seed: int) -> list[str]:
        """Questions, with the words that ask for an answer behind them."""
        begin = list(self.tokenizer(FIRST_NUMBER, add_special_tokens=False)["input_ids"])
        lists = self._sample(
            self._list_front(chunk), [begin] * LISTS, seed, None, new=LIST_TOKENS, temperature=OF_LISTS
        )
        found = dict.fromkeys(question for said in lists for question in listed(said))
        # A line of its own, wherever the text ends.
        line = "" if self.text.endswith("\n") else "\n"
        asking = itertools.cycle(ASKING)
        return [f"{line}{before} {question}{after}" for question, (before, after) in zip(found, asking, strict=False)]

    def _list_front(self, chunk: str) -> list[int]:
        """The ids that ask for a list of questions about a part of the text."""
        if getattr(self.tokenizer, "chat_template", None):
            try:
                return question_ids(self.tokenizer, f"{chunk.rstrip()}\n\n{LIST_REQUEST}", "a request for questions")
            except DataError:  # a template that wants something else than one turn of a user
                pass
        return Plain(self.tokenizer, f"{chunk.rstrip()}\n\n{LIST_HEADING}\n").front

    def _sample(
        self,
        front: Sequence[int],
        behind: list[list[int]],
        seed: int,
        end: str | None,
        *,
        new: int = MOST_TOKENS,
        temperature: float = 1.0,
    ) -> list[str]:
        """What the model says, in at most `new` tokens, behind a part of the text and each of `behind`."""
        last = list(front[-1:])  # something has to be read for there to be something said
        positions = positions_of(self.model)
        if positions is not None:
            new = min(new, positions - len(front) - max(map(len, behind)))
        if new < 1:  # one line that fills the model
            return []
        with Front.of(self.model, front[:-1]).before(self.model) as reader:
            found = answer(
                reader,
                self.tokenizer,
                [last + ids for ids in behind],
                max_new_tokens=new,
                padding=self.padding,
                end=end,
                chat=self.options.chat,
                temperature=temperature,
                seed=seed,
                top_p=TOP_P,
            )
        return [said_as_is(self.tokenizer, ids, end) for ids in found]


def chunks_of(tokenizer: Any, text: str, most: int) -> list[str]:
    """The text in parts of about `most` tokens, which begin and end where lines do."""
    parts: list[str] = [""]
    used = 0
    for line in text.splitlines(keepends=True):
        length = len(tokenizer(line, add_special_tokens=False)["input_ids"])
        if used and used + length > most:
            parts.append("")
            used = 0
        parts[-1] += line
        used += length
    return [part for part in parts if part.strip()]


def listed(said: str) -> list[str]:
    """The questions of a list that begins behind its first number, each with its question mark, in one line."""
    before_marks = [line.split("?", 1)[0].strip() for line in said.splitlines() if "?" in line]
    found = [NUMBER.sub("", text) for text in before_marks]
    return [f"{question}?" for question in found if any(map(str.isalpha, question))]


def cut_somewhere(tokenizer: Any, lines: Sequence[str], seed: int) -> list[str]:
    """The beginnings of lines, as far as a token chosen at random, never the whole."""
    draw = random.Random(seed)
    found = []
    for line in lines:
        ids = tokenizer(line, add_special_tokens=False)["input_ids"]
        if len(ids) > 1:
            found.append(tokenizer.decode(ids[: draw.randint(1, len(ids) - 1)]))
    return found


def said_as_is(tokenizer: Any, ids: Sequence[int], end: str | None) -> str:
    """The text of an answer without what ends it, its white space as it is at the beginning."""
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    return (text.split(end)[0] if end is not None else text).rstrip()


def _pack(texts: Sequence[str]) -> dict[str, Tensor]:
    data = [text.encode("utf-8", "replace") for text in texts]
    whole = b"".join(data)
    return {
        "text": torch.frombuffer(bytearray(whole), dtype=torch.uint8) if whole else torch.zeros(0, dtype=torch.uint8),
        "lengths": torch.tensor([len(each) for each in data], dtype=torch.int64),
    }


def _unpack(kept: dict[str, Tensor]) -> list[str]:
    pieces = kept["text"].split(kept["lengths"].tolist())
    return [bytes(piece.tolist()).decode("utf-8", "replace") for piece in pieces]
