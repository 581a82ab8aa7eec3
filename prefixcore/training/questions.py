"""What a model is asked: a text to continue, or a conversation of which it is to say the next turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .chat import Conversation, question_ids
from .chat_rows import CHAT, is_conversation, read_parts
from .columns import USUAL, Columns
from .data import DataError, Example, encode
from .left_out import check_asked, check_tools
from .messages import ASSISTANT, only_read
from .prompt_rows import prompt_rows
from .template import write_turns


@dataclass(frozen=True)
class Question:
    """What a model is asked, and the right answer where somebody says what it is.

    Attributes:
        prompt: a text to continue; or messages, which the model's chat template writes.
        given: what the template is told beside the messages, such as `tools`.
        example: the prompt with its right answer; None: nobody says what it is.
        source: where it comes from, for messages.

    Examples:
        >>> from prefixcore.training import Question
        >>> Question("Peru ->").ids(tokenizer) == tokenizer("Peru ->")["input_ids"]
        True
    """

    prompt: str | list[dict[str, Any]]
    given: Mapping[str, Any] = field(default_factory=dict)
    example: Example | None = None
    source: str = "prompt"

    def ids(self, tokenizer: Any, *, chat: bool = False) -> list[int]:
        """The token ids that the model is asked with.

        Args:
            tokenizer: the model's; with a chat template where there are messages.
            chat: a text is what a user says, written by the template.

        Raises:
            DataError: there are none, the template refuses the messages, or it leaves some of them or the tools out.
        """
        if isinstance(self.prompt, str):
            return prompt_ids(tokenizer, self.prompt, self.source, chat=chat)
        ask = partial(write_turns, tokenizer, source=self.source, add_generation_prompt=True)
        text = ask(self.prompt, given=self.given)
        if "tools" in self.given:
            check_tools(partial(ask, given={**self.given, "tools": None}), self.prompt, text, self.source)
        check_asked(partial(ask, given=self.given), self.prompt, 0, text, self.source)
        return encode(tokenizer, text, self.source, add_special_tokens=False)

    def expected(self, tokenizer: Any, end: str | None = None) -> str | None:
        """The right answer as it is decoded from what the model says; None: nobody says what it is.

        Args:
            tokenizer: the model's.
            end: text at which answers are cut.

        Raises:
            DataError: it goes on behind that text, or the tokenizer cannot encode it.
        """
        if self.example is None:
            return None
        answer = self.example.expected(tokenizer, self.example.to_ids(tokenizer, end))
        return answer.split(end)[0] if end else answer


def read_questions(path: str | Path, *, columns: tuple[str, str] = USUAL) -> list[Question]:
    r"""Reads what a model is to be asked, one question a row.

    A row has a `prompt`, and a `completion` where there is a right answer; or a conversation in one of the forms of
    `read_examples(chat=True)`, of which the model says the assistant's next turn. Where the last turn is the
    assistant's, the model says that one again, and it is the right answer. `.csv`, `.tsv` and `.parquet` are tables;
    any other file is JSON (an object a line, or a list of objects), or plain lines, each a prompt.

    Args:
        path: the file, in UTF-8.
        columns: what prompt and completion are called, such as `("question", "answer")`.

    Raises:
        DataError: no such file, one that cannot be read, a row that holds no question, or none at all.

    Examples:
        >>> from pathlib import Path
        >>> from prefixcore.training import read_questions
        >>> _ = Path("asked.jsonl").write_text('{"messages": [{"role": "user", "content": "Peru?"}]}\n')
        >>> read_questions("asked.jsonl")[0].prompt
        [{'role': 'user', 'content': 'Peru?'}]
    """
    names = Columns(*columns)
    return [_question(row, source, names) for source, row in prompt_rows(Path(path), CHAT, names)]


def _question(row: dict[str, Any], source: str, columns: Columns) -> Question:
    if is_conversation(row):
        messages, tools, told = read_parts(row, source, "field", learnt=False)
        given = {**(told or {}), **({"tools": tools} if tools else {})}
        is_answered = bool(messages) and messages[-1]["role"] == ASSISTANT
        asked = messages[:-1] if is_answered else messages
        if all(message["role"] == ASSISTANT for message in asked):
            raise DataError(
                f"{source}: nothing is asked: no message of another than {ASSISTANT!r} comes before its turn"
            )
        if not is_answered or messages[-1].get("weight") == 0:
            return Question(asked, given, None, source)
        answered = [*only_read(asked), messages[-1]]  # of which that turn alone is held against the template
        return Question(asked, given, Conversation.of(answered, source, tools=tools, template_kwargs=told), source)
    prompt, completion = row.get("prompt"), row.get("completion") or None
    if not isinstance(prompt, str) or not prompt:
        found = f" (found: {', '.join(row) or 'none'}); what it is called can be said (--prompt-column)"
        raise DataError(
            f"{source}: the field {columns.prompt!r} must be a text that is not empty, or a list of messages"
            + ("" if "prompt" in row else found)
        )
    if completion is not None and not isinstance(completion, str):
        raise DataError(f"{source}: the field {columns.completion!r} must be a text, or be left out")
    return Question(prompt, {}, Example(prompt, completion, source) if completion else None, source)


def prompt_ids(tokenizer: Any, prompt: str, source: str, *, chat: bool) -> list[int]:
    """The ids that the model is asked with; DataError, which begins with `source`: there are none."""
    ids = question_ids(tokenizer, prompt, source) if chat else encode(tokenizer, prompt, source)
    if not ids:
        raise DataError(f"{source} has no token; there is nothing to continue from")
    return ids
