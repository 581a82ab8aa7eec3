"""Conversations: written by the model's chat template, and learnt in the assistant's turns alone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from .data import DataError, Example, TokenizedExample, encode
from .json_values import texts, to_json
from .left_out import check_asked, check_said, check_tools
from .messages import ASSISTANT, learnt_turns, only_read, text_of
from .template import write_turns


class _Turn(NamedTuple):
    """What the assistant is asked with, from the beginning of the conversation, and what it says."""

    number: int
    asked: str
    said: str


@dataclass(frozen=True)
class Conversation(Example):
    """Messages up to the assistant's last turn to learn, and the tools that it may call.

    `prompt` is the JSON of the messages before its first turn (with tools or arguments of the template, an object that
    has them too), and `completion` of the others: conversations that begin alike stay on one side of a split, and have
    a digest like every example.
    """

    @classmethod
    def of(
        cls,
        messages: Sequence[dict[str, Any]],
        source: str,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> Conversation:
        """From messages that `check_messages` has let pass; what comes after the last turn to learn is left out.

        Args:
            messages: in their one form.
            source: where they are from.
            tools: JSON schemas of what the assistant may call.
            template_kwargs: what else the chat template is told.
        """
        last = learnt_turns(messages)[-1]
        begun = next(place for place, message in enumerate(messages) if message["role"] != ASSISTANT)
        first = next(place for place in range(begun, last + 1) if messages[place]["role"] == ASSISTANT)
        given = {"tools": tools, "chat_template_kwargs": template_kwargs}
        given = {name: value for name, value in given.items() if value}
        beginning = {"messages": messages[:first], **given} if given else messages[:first]
        return cls(to_json(beginning), to_json(messages[first : last + 1]), source)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All of them; those of the assistant's with the weight 0 are not learnt."""
        beginning = json.loads(self.prompt)
        first = beginning if isinstance(beginning, list) else beginning["messages"]
        return [*first, *json.loads(self.completion)]

    @property
    def given(self) -> dict[str, Any]:
        """What the template is told beside the messages."""
        beginning = json.loads(self.prompt)
        if isinstance(beginning, list):
            return {}
        tools = {"tools": beginning["tools"]} if "tools" in beginning else {}
        return {**beginning.get("chat_template_kwargs", {}), **tools}

    @property
    def answer(self) -> str:
        """The last turn: its text, and the JSON of the tools that it calls."""
        message = self.messages[-1]
        calls = [to_json(call["function"]) for call in message.get("tool_calls", [])]
        return "\n".join([text_of(message), *calls]) if calls else text_of(message)

    def expected(self, tokenizer: Any, ids: TokenizedExample) -> str:
        """The last turn as the template writes it, which is what the model is to say."""
        return str(tokenizer.decode(ids.answer_ids, skip_special_tokens=True))

    def to_ids(self, tokenizer: Any, end: str | None) -> TokenizedExample:
        """Token ids; the assistant's turns, and the token that ends each of them, are learnt.

        Args:
            tokenizer: with a chat template.
            end: not for conversations, whose template ends each turn.
        """
        ids: list[int] = []
        learnt: list[bool] = []
        written = ""
        for number, asked, said in self._turns(tokenizer):
            if not asked.startswith(written):
                raise DataError(
                    f"{self.source}: the model's chat template writes what comes before message {number} otherwise "
                    "once that is there, so the conversation is no one text; make one of each turn with "
                    "prefixcore.training.unroll"
                )
            for text, is_learnt in ((asked[len(written) :], False), (said, True)):
                new = encode(tokenizer, text, f"{self.source}: message {number}", add_special_tokens=False)
                ids += new
                learnt += [is_learnt] * len(new)
            written = asked + said
        if True not in learnt:
            raise DataError(f"{self.source}: the assistant's turns have no token; there is nothing to learn from them")
        first = learnt.index(True)
        if first == 0:
            raise DataError(f"{self.source}: no token stands before the assistant's first turn")
        return TokenizedExample(ids[:first], ids[first:], learnt[first:])

    def unrolled(self, tokenizer: Any) -> list[Conversation]:
        """This conversation, or one for each turn that is learnt where the template does not write them as one text."""
        written, numbers, is_one = "", [], True
        for number, asked, said in self._turns(tokenizer):
            is_one = is_one and asked.startswith(written)
            numbers.append(number)
            written = asked + said
        return [self] if is_one else [self._up_to(number) for number in numbers]

    def _up_to(self, number: int) -> Conversation:
        """The messages up to this one, which alone is learnt."""
        messages = self.messages[:number]
        completion = json.loads(self.completion)
        rest = completion[: number - (len(self.messages) - len(completion))]
        return Conversation(self.prompt, to_json([*only_read(rest[:-1]), messages[-1]]), self.source)

    def _turns(self, tokenizer: Any) -> Sequence[_Turn]:
        """The turns that are learnt, as the template writes them."""
        messages, given, start = self.messages, self.given, 0
        found: list[_Turn] = []
        for place in learnt_turns(messages):
            where = f"{self.source}: message {place + 1}"
            ask = partial(write_turns, tokenizer, source=self.source, add_generation_prompt=True, given=given)
            tell = partial(write_turns, tokenizer, source=self.source, add_generation_prompt=False, given=given)
            asked = ask(messages[:place])
            whole = tell(messages[: place + 1])
            if not whole.startswith(asked):
                same = len(os.path.commonprefix([asked, whole]))
                raise DataError(
                    f"{where}: the model's chat template asks for it with {_piece(asked[same:])} and then writes "
                    f"{_piece(whole[same:])} there, so what the assistant is to say cannot be told from the rest; "
                    "chat_template_kwargs may change what it asks with"
                )
            said = _up_to_the_end(whole[len(asked) :], messages[place], tokenizer.eos_token, where)
            if "tools" in given and not found:
                check_tools(partial(ask, given={**given, "tools": None}), messages[:place], asked, self.source)
            check_asked(ask, messages[:place], start, asked, self.source)
            check_said(tell, messages[: place + 1], said, whole, self.source)
            found.append(_Turn(place + 1, asked, said))
            start = place + 1
        return found


def unroll(tokenizer: Any, examples: Sequence[Example]) -> list[Example]:
    """Examples of which each is one text.

    Some chat templates write a turn of the assistant's otherwise once later messages are there: Qwen3's, say, leaves
    out what the model thought before. What a server then reads at one turn is not the beginning of what it reads at the
    next, so a conversation becomes several: one for each of the assistant's turns, which alone is learnt, behind what
    is read before it. All others stay as they are.

    Args:
        tokenizer: a transformers tokenizer; with a chat template where there are conversations.
        examples: from `read_examples`; split first, so that one conversation's turns stay on one side.

    Returns:
        As many examples, or more.

    Raises:
        DataError: the template refuses a conversation, leaves out what is to be learnt, or does not write a turn behind
            what it asks for the turn with.

    Examples:
        >>> from prefixcore.training import Example, unroll
        >>> len(unroll(tokenizer, [Example("Peru ->", " Lima")]))
        1
    """
    return [each for one in examples for each in (one.unrolled(tokenizer) if isinstance(one, Conversation) else [one])]


def question_ids(tokenizer: Any, question: str, source: str) -> list[int]:
    """The ids of a user's turn that the assistant is to answer.

    Args:
        tokenizer: with a chat template.
        question: what the user says.
        source: what a message about it begins with.
    """
    messages = [{"role": "user", "content": question}]
    text = write_turns(tokenizer, messages, source, add_generation_prompt=True)
    return encode(tokenizer, text, source, add_special_tokens=False)


def _up_to_the_end(said: str, message: dict[str, Any], eos: str | None, where: str) -> str:
    """A turn without what the template writes after the end-of-sequence token, when the model has stopped."""
    if not eos or eos not in said:
        return said
    fields = {**message, "content": text_of(message).rstrip().removesuffix(eos)}
    for name, value in fields.items():
        if any(eos in text for text in texts(value)):
            raise DataError(
                f"{where}: its {name} goes on behind {eos!r}, where the model stops; leave that token out of it"
            )
    return said[: said.index(eos) + len(eos)]


def _piece(text: str) -> str:
    """The beginning of a text, for a message."""
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
