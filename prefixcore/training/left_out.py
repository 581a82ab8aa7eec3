"""What a chat template leaves out: it is a program that reads some fields, and says nothing of the others.

A field has been left out if another one in its place changes nothing. Of what every template writes, finding its text
among what was written is enough; of the rest it may stand there by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .data import DataError
from .json_values import shown
from .messages import ASSISTANT, text_of

Write = Callable[[Sequence[dict[str, Any]]], str]
"""Messages as text; DataError: the template refuses them."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""The names that templates have for what a model thinks before it answers."""


def check_tools(write_without: Write, messages: Sequence[dict[str, Any]], asked: str, where: str) -> None:
    """Raises DataError if what the assistant is asked with is the same without tools."""
    if _is_same(write_without, messages, asked):
        raise DataError(
            f"{where}: the model's chat template does not write the tools; leave them out, or write them into the "
            "system message as the model reads them"
        )


def check_asked(write: Write, messages: Sequence[dict[str, Any]], start: int, asked: str, where: str) -> None:
    """Raises DataError if a message of others, from `start` on, is not in what the assistant is asked with."""
    for place, message in enumerate(messages):
        text = text_of(message).strip()
        if place < start or message["role"] == ASSISTANT or (message["role"] == "user" and text in asked):
            continue
        changed = [*messages[:place], {**message, "content": f"not {text}"}, *messages[place + 1 :]]
        if _is_same(write, changed, asked):
            raise DataError(
                f"{where}: the model's chat template does not write message {place + 1}, of the role "
                f"{shown(message['role'])}; give it a role that the template knows, or leave it out"
            )


def check_said(write: Write, messages: Sequence[dict[str, Any]], said: str, whole: str, where: str) -> None:
    """Raises DataError if the last message, which is learnt, has something to say that is not in `said`."""
    *before, message = messages
    for name, others in _others(message, said):
        if _is_same(write, [*before, {**message, **others}], whole):
            beside = " beside its tool_calls" if name == "content" and "tool_calls" in message else ""
            raise DataError(
                f"{where}: the model's chat template does not write the {name} of message {len(messages)}{beside}, so "
                "it would not be learnt; leave the field out, or write it into another one as the model says it"
            )


def _others(message: dict[str, Any], said: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is not sure to be in `said`, and other values in its place."""
    text = text_of(message).strip()
    calls = [call["function"] for call in message.get("tool_calls", [])]
    if text and (calls or text not in said):
        yield "content", {"content": f"not {text}"}
    for place, call in enumerate(calls):  # some templates write the first one alone
        changed = {**call, "name": f"not_{call['name']}"}
        yield "tool_calls", _called(message, [*calls[:place], changed, *calls[place + 1 :]])
    if any(call["arguments"] for call in calls):
        yield "arguments of the tool_calls", _called(message, [{**call, "arguments": {}} for call in calls])
    thoughts = [name for name in REASONING if isinstance(message.get(name), str)]
    if any(message[name].strip() for name in thoughts):
        yield thoughts[0], {name: f"not {message[name]}" for name in thoughts}


def _called(message: dict[str, Any], functions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The calls of a message, of these functions."""
    calls = zip(message["tool_calls"], functions, strict=True)
    return {"tool_calls": [{**call, "function": function} for call, function in calls]}


def _is_same(write: Write, messages: Sequence[dict[str, Any]], text: str) -> bool:
    """Whether these messages are written as `text`."""
    try:
        return write(messages) == text
    except DataError:
        return False
