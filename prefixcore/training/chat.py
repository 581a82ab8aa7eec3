"""Conversations: written by the model's chat template, and learnt in the assistant's turns alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .data import DataError, Example, TokenizedExample, encode, is_whole

ASSISTANT = "assistant"


@dataclass(frozen=True)
class Conversation(Example):
    """Messages up to the assistant's last turn.

    `prompt` is the JSON of those before its first turn, and `completion` of the others: conversations that begin alike
    stay on one side of a split, and have a digest like every example.
    """

    @classmethod
    def of(cls, messages: Sequence[dict[str, str]], source: str) -> Conversation:
        """From messages that `check_messages` has let pass; what comes after the assistant's last turn is left out."""
        turns = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
        first, last = turns[0], turns[-1]
        return cls(_json(messages[:first]), _json(messages[first : last + 1]), source)

    @property
    def messages(self) -> list[dict[str, str]]:
        return [*json.loads(self.prompt), *json.loads(self.completion)]

    @property
    def answer(self) -> str:
        return str(self.messages[-1]["content"])

    def to_ids(self, tokenizer: Any, end: str | None) -> TokenizedExample:
        """Token ids; the assistant's turns, and the token that ends each of them, are learnt.

        Args:
            tokenizer: with a chat template.
            end: not for conversations, whose template ends each turn.
        """
        messages, written = self.messages, ""
        ids: list[int] = []
        learnt: list[bool] = []
        for index, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            asked = write_turns(tokenizer, messages[:index], self.source, add_generation_prompt=True)
            whole = write_turns(tokenizer, messages[: index + 1], self.source, add_generation_prompt=False)
            if not asked.startswith(written) or not whole.startswith(asked):
                raise DataError(
                    f"{self.source}: the model's chat template does not write message {index + 1} after what it "
                    "writes of those before it, so what the assistant is to say cannot be told from the rest; end the "
                    f"conversation before message {index + 1}"
                )
            said = whole[len(asked) :]
            # What the template writes after the end-of-sequence token comes when the model has stopped.
            stop = said.find(tokenizer.eos_token) if tokenizer.eos_token else -1
            said = said if stop < 0 else said[: stop + len(tokenizer.eos_token)]
            for text, is_learnt in ((asked[len(written) :], False), (said, True)):
                new = encode(tokenizer, text, f"{self.source}: message {index + 1}", add_special_tokens=False)
                ids += new
                learnt += [is_learnt] * len(new)
            written = asked + said
        if True not in learnt:
            raise DataError(f"{self.source}: the assistant's turns have no token; there is nothing to learn from them")
        first = learnt.index(True)
        if first == 0:
            raise DataError(f"{self.source}: no token stands before the assistant's first turn")
        return TokenizedExample(ids[:first], ids[first:], learnt[first:])


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


def write_turns(tokenizer: Any, messages: Sequence[dict[str, str]], source: str, *, add_generation_prompt: bool) -> str:
    """Messages as the model's chat template writes them; DataError, which begins with `source`: it refuses them."""
    check_template(tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except MemoryError:
        raise
    except Exception as error:  # a template is a program of the model's author: it raises what it likes
        lines = str(error).splitlines() or [type(error).__name__]
        raise DataError(f"{source}: the model's chat template refuses the messages: {lines[0]}") from error
    return str(text)


def check_template(tokenizer: Any) -> None:
    """Raises DataError if the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the model's tokenizer has no chat template, so messages cannot be written for it; take a model that has "
            "one, as those made for chats do, or data with prompt and completion"
        )


def check_messages(messages: Any, where: str) -> list[dict[str, str]]:
    """Messages with role and content alone.

    Args:
        messages: as they were read.
        where: what a message about them begins with.

    Raises:
        DataError: not a list of objects with texts `role` and `content`, or no turn of the assistant's after another's.
    """
    if not isinstance(messages, list):
        raise DataError(f'{where} must be a list of {{"role": ..., "content": ...}}, got {type(messages).__name__}')
    checked = []
    for number, message in enumerate(messages, start=1):
        for field in ("role", "content"):
            value = message.get(field) if isinstance(message, dict) else None
            if not isinstance(value, str) or not is_whole(value):
                raise DataError(f"{where}: message {number} has no text {field!r}")
        if message.get("tool_calls"):
            raise DataError(
                f"{where}: message {number} has tool_calls, which are not learnt; leave such conversations out, or "
                "write the calls into its content as the model does"
            )
        checked.append({"role": message["role"], "content": message["content"]})
    roles = [message["role"] for message in checked]
    if ASSISTANT not in roles:
        raise DataError(f"{where}: no turn of the role {ASSISTANT!r}, which is what is learnt (found: {_found(roles)})")
    if roles[0] == ASSISTANT:
        raise DataError(f"{where}: the first turn is the assistant's; there is nothing that it answers")
    return checked


def _found(roles: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(roles)) or "none"


def _json(messages: Sequence[dict[str, str]]) -> str:
    return json.dumps(messages, ensure_ascii=False, separators=(",", ":"))
