"""Messages of a conversation: what they may hold, and the one form in which all of them are kept.

A message is an object with `role`, `content` (a text, or a list of parts that are texts) and whatever else the model's
chat template reads, such as `tool_calls`, `tool_call_id` or `reasoning_content`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .data import DataError, is_whole
from .json_values import check_json, json_name, parsed, shown

ASSISTANT = "assistant"

NOT_LEARNT = {"weight": 0}
"""What marks a turn of the assistant's that is read and not learnt."""


def check_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """Messages in their one form, among which there is a turn to learn.

    Args:
        messages: as they were read.
        where: what a message about them begins with.

    Raises:
        DataError: not a list of messages, or no turn of the assistant's after another's.
    """
    checked = check_each(messages, where)
    check_turns(checked, where)
    return checked


def check_each(messages: Any, where: str) -> list[dict[str, Any]]:
    """Messages in their one form, whoever they are of; DataError: they are not a list of messages."""
    messages = parsed(messages, where)
    if not isinstance(messages, list):
        raise DataError(f'{where} must be a list of {{"role": ..., "content": ...}}, got {json_name(messages)}')
    return [_message(message, f"{where}: message {number}") for number, message in enumerate(messages, start=1)]


def check_turns(messages: Sequence[dict[str, Any]], where: str) -> None:
    """Raises DataError if there is no turn to learn, or nothing before the first one."""
    if not any(message["role"] == ASSISTANT for message in messages):
        found = ", ".join(dict.fromkeys(shown(message["role"]) for message in messages)) or "none"
        raise DataError(f"{where}: no turn of the role {ASSISTANT!r}, which is what is learnt (found: {found})")
    learnt = learnt_turns(messages)
    if not learnt:
        raise DataError(f"{where}: no turn of the role {ASSISTANT!r} is to be learnt: each has the weight 0")
    if all(message["role"] == ASSISTANT for message in messages[: learnt[0]]):
        raise DataError(
            f"{where}: the first turn is the assistant's; there is nothing that it answers. Leave it out, or give it "
            '"weight": 0 to have it read and not learnt'
        )


def learnt_turns(messages: Sequence[dict[str, Any]]) -> list[int]:
    """Where the turns stand that are to be learnt."""
    return [
        place for place, message in enumerate(messages) if message["role"] == ASSISTANT and message.get("weight") != 0
    ]


def only_read(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages none of which is to be learnt."""
    return [{**message, **NOT_LEARNT} if message["role"] == ASSISTANT else message for message in messages]


def text_of(message: dict[str, Any]) -> str:
    """The content of a message as one text: parts are joined by line breaks, as vLLM's server joins them."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message in its one form: role, content, then the other fields by name, without those that are null."""
    if not isinstance(message, dict):
        raise DataError(f'{where} must be an object, {{"role": ..., "content": ...}}, got {json_name(message)}')
    check_json(message, where)
    given = {name: value for name, value in message.items() if value is not None}
    role, content = given.pop("role", None), given.pop("content", None)
    if not isinstance(role, str) or not role or not is_whole(role):
        raise DataError(f"{where} has no text 'role'")
    weight = _weight(given.pop("weight", None), role, where)
    calls = _tool_calls(given.pop("tool_calls", None), role, where)
    if given.get("function_call"):
        raise DataError(f"{where} has a function_call; give it as tool_calls, which templates read")
    if given.get("audio"):
        raise DataError(f"{where} has audio; only texts are learnt")
    checked = {"role": role}
    if content is not None or not calls:
        checked["content"] = _content(content, where)
    return {**checked, **dict(sorted({**given, **calls, **weight}.items()))}


def _content(content: Any, where: str) -> Any:
    """A text, or several parts that are texts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise DataError(f"{where} has no text 'content' (found: {json_name(content)})")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            what = (
                f"of the type {shown(kind)}" if isinstance(kind, str) else f"that is {json_name(part)} without a type"
            )
            raise DataError(
                f"{where}: its content has a part {what}; only texts are learnt, no images and no sounds, so each part "
                'must be {"type": "text", "text": ...}'
            )
        if not isinstance(part.get("text"), str):
            raise DataError(f"{where}: its content has a part without the text 'text'")
    parts = [{"type": "text", "text": part["text"]} for part in content]
    return parts[0]["text"] if len(parts) == 1 else parts


def _weight(weight: Any, role: str, where: str) -> dict[str, int]:
    """OpenAI's weight: 0 is kept, 1 is what holds where none is given."""
    if weight is None:
        return {}
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"{where}: the weight must be 0 (read) or 1 (learnt), got {shown(weight)}")
    if role != ASSISTANT:
        if weight:
            raise DataError(f"{where}: the weight is 1, but only turns of the role {ASSISTANT!r} are learnt")
        return {}
    return {} if weight else NOT_LEARNT


def _tool_calls(calls: Any, role: str, where: str) -> dict[str, list[dict[str, Any]]]:
    """Calls of tools in the form that templates read: arguments are an object, not its JSON text."""
    calls = parsed(calls, f"{where}: tool_calls")
    if not calls:
        return {}
    if role != ASSISTANT:
        raise DataError(f"{where} has tool_calls, but the role {shown(role)}: only the assistant calls tools")
    if not isinstance(calls, list):
        raise DataError(f"{where}: tool_calls must be a list, got {json_name(calls)}")
    return {"tool_calls": [_tool_call(call, f"{where}: tool call {n}") for n, call in enumerate(calls, start=1)]}


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    check_json(call, where)
    if not isinstance(call, dict):
        raise DataError(f"{where} must be an object, got {json_name(call)}")
    if "function" in call:
        function, others = call["function"], {name: value for name, value in call.items() if name != "function"}
    else:  # {"name": ..., "arguments": ...}, as transformers takes it too
        function = {name: value for name, value in call.items() if name in ("name", "arguments")}
        others = {name: value for name, value in call.items() if name not in function}
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise DataError(f'{where} has no name; expected {{"function": {{"name": ..., "arguments": ...}}}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parsed(arguments, f"{where}: its arguments") if arguments.strip() else {}
        check_json(arguments, f"{where}: its arguments")
    if arguments is not None and not isinstance(arguments, dict):
        raise DataError(
            f"{where}: its arguments must be an object, or the JSON text of one, got {json_name(arguments)}"
        )
    others = {name: value for name, value in others.items() if value is not None}
    return {"type": "function", **others, "function": {**function, "arguments": arguments or {}}}
