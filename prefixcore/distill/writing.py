"""How the text and the prompts are written: as the teacher reads them, one behind the other, and as requests come."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

from ..training.chat import question_ids
from ..training.data import encode
from ..training.questions import prompt_ids
from ..training.template import write_turns
from .errors import DistillError


@dataclass(frozen=True)
class Prompt:
    """What the model is asked.

    Attributes:
        text: of the prompt; with chat, what the user says.
        completion: the right answer; None: nobody says what it is.
        source: where it comes from, for messages.

    Examples:
        >>> from prefixcore.distill import Prompt
        >>> Prompt("Portugal ->", " Lisbon").completion
        ' Lisbon'
    """

    text: str
    completion: str | None = None
    source: str = "prompt"


@dataclass(frozen=True)
class Asked:
    """A prompt in ids.

    Attributes:
        prompt: which.
        behind: what the teacher reads behind the text.
        alone: what a request holds, which the student reads behind its prefix.
        given: the ids that stand in the answer's place, where the teacher is not to answer but to read on.
    """

    prompt: Prompt
    behind: list[int]
    alone: list[int]
    given: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        """Of what the teacher reads behind the text, with what is given."""
        return len(self.behind) + len(self.given or ())


class Writer(Protocol):
    """Writes a text and the prompts behind it.

    Attributes:
        front: the ids that stand before every prompt.
    """

    front: list[int]

    def ask(self, prompt: Prompt) -> Asked:
        """The prompt in ids; DataError: it has none."""
        ...

    def recite(self) -> list[Asked]:
        """The text again, in pieces, each to be gone on with from its beginning; none where there is no such prompt."""
        ...


def writer(tokenizer: Any, text: str, *, chat: bool) -> Writer:
    """How `text` is put before prompts.

    Args:
        tokenizer: the model's.
        text: that of the teacher.
        chat: whether it is the system message of a conversation.

    Raises:
        DataError: a text that cannot be encoded; with chat, a model without a template, or one that refuses it.
        DistillError: a text without a token, or that the template leaves out.
    """
    if not text.strip():
        raise DistillError("the text has no token: give one with something in it")
    return Chat(tokenizer, text) if chat else Plain(tokenizer, text)


PIECE, BEGINNING = 48, 4
"""Tokens of a piece of the text that is recited, and how many of them are its prompt."""


class Plain:
    """Text and prompts one after the other, tokenised apart.

    Where the tokenizer begins every text with a token of its own, the teacher has it before the text, and a request,
    which is written as ever, at its own beginning.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        self._tokenizer = tokenizer
        ids = encode(tokenizer, text, "the text", add_special_tokens=False)
        whole = encode(tokenizer, text, "the text")
        self.begins = whole != ids and whole[:1] == [tokenizer.bos_token_id]
        self.front = [tokenizer.bos_token_id, *ids] if self.begins else ids

    def ask(self, prompt: Prompt) -> Asked:
        """The prompt in ids; DataError: it has none."""
        alone = prompt_ids(self._tokenizer, prompt.text, prompt.source, chat=False)
        behind = encode(self._tokenizer, prompt.text, prompt.source, add_special_tokens=False)
        return Asked(prompt, behind, alone)

    def recite(self) -> list[Asked]:
        """The text again, in pieces that overlap by a half."""
        begin = 1 if self.begins else 0
        ids = self.front[begin:]
        found = []
        for start in range(0, max(1, len(ids) - PIECE // 2), PIECE // 2):
            piece = ids[start : start + PIECE]
            if len(piece) > BEGINNING:
                asked, rest = piece[:BEGINNING], tuple(piece[BEGINNING:])
                prompt = Prompt(self._tokenizer.decode(asked), None, f"the text from token {start}")
                found.append(Asked(prompt, asked, [*self.front[:begin], *asked], rest))
        return found


class Chat:
    """The text as the system message, prompts as a user's turns, written by the model's chat template.

    `front` is all that the template writes before the user's first word.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        self._tokenizer, self._text = tokenizer, text
        self._written = os.path.commonprefix([self._write(word, "the text") for word in ("a", "b")])
        if text.strip() not in self._written:
            raise DistillError(
                "the model's chat template does not write the system message, or not before the user's turn; leave "
                "chat out, and write the prompts as the model reads them"
            )
        self.front = encode(tokenizer, self._written, "the text", add_special_tokens=False)

    def ask(self, prompt: Prompt) -> Asked:
        """The prompt in ids; DataError: the template refuses it."""
        whole = self._write(prompt.text, prompt.source)
        if not whole.startswith(self._written):
            raise DistillError(f"{prompt.source}: the model's chat template writes another text before this prompt")
        behind = encode(self._tokenizer, whole[len(self._written) :], prompt.source, add_special_tokens=False)
        return Asked(prompt, behind, question_ids(self._tokenizer, prompt.text, prompt.source))

    def recite(self) -> list[Asked]:
        """None: a user's turn is no beginning of the text."""
        return []

    def _write(self, said: str, source: str) -> str:
        messages = [{"role": "system", "content": self._text}, {"role": "user", "content": said}]
        return write_turns(self._tokenizer, messages, source, add_generation_prompt=True)
