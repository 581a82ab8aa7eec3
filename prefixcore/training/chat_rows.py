"""A row as a conversation: `messages`, TRL's `prompt` and `completion` of messages, or ShareGPT's `conversations`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .chat import Conversation
from .data import DataError
from .json_values import check_json, json_name, parsed
from .messages import ASSISTANT, check_each, check_turns, learnt_turns, only_read
from .sharegpt import to_messages
from .template import OURS

IMAGES = ("image", "images")

CHAT = ("messages", "prompt", "completion", "conversations", "system", "tools", "chat_template_kwargs", *IMAGES)
"""The columns that are read where there are conversations; the others are ignored."""


def conversation(row: Mapping[str, Any], source: str, kind: str) -> Conversation:
    """The conversation of a row.

    Args:
        row: what it holds, by name; lists and objects may be JSON texts, as in a CSV.
        source: where it is from.
        kind: what its names are: "field" or "column".

    Raises:
        DataError: there is none, or one that cannot be learnt.
    """
    parts = read_parts(row, source, kind, learnt=True)
    return Conversation.of(parts.messages, source, tools=parts.tools, template_kwargs=parts.template_kwargs)


class Parts(NamedTuple):
    """What a row with a conversation holds: messages, and what the template is told beside them."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    template_kwargs: dict[str, Any] | None


def read_parts(row: Mapping[str, Any], source: str, kind: str, *, learnt: bool) -> Parts:
    """The conversation of a row, as of `conversation`.

    Args:
        row, source, kind: as of `conversation`.
        learnt: whether it is to have a turn that is learnt; else TRL's `prompt` may stand alone.

    Raises:
        DataError: there is none.
    """
    for name in IMAGES:
        if row.get(name):
            raise DataError(f"{source}: the {kind} {name!r} holds images; only texts are learnt")
    messages = _messages(row, source, kind, learnt)
    return Parts(messages, _tools(row, source, kind), _template_kwargs(row, source, kind))


def is_conversation(row: Mapping[str, Any]) -> bool:
    """Whether a row has messages, where prompt and completion are expected."""
    columns = any(row.get(name) is not None for name in ("messages", "conversations"))
    return columns or any(isinstance(row.get(name), list) for name in ("prompt", "completion"))


def _messages(row: Mapping[str, Any], source: str, kind: str, learnt: bool) -> list[dict[str, Any]]:
    turns = next((name for name in ("messages", "conversations") if row.get(name) is not None), None)
    if turns is not None:
        where = f"{source}: the {kind} {turns!r}"
        messages = check_each(to_messages(row[turns], row.get("system"), where), where)
    elif isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        where = f"{source}: the {kind} 'completion'"
        completion = check_each(row["completion"], where)
        if not learnt_turns(completion):
            raise DataError(f"{where}: no turn of the role {ASSISTANT!r} to be learnt")
        messages = [*only_read(check_each(row["prompt"], f"{source}: the {kind} 'prompt'")), *completion]
    elif not learnt and isinstance(row.get("prompt"), list):
        messages = check_each(row["prompt"], f"{source}: the {kind} 'prompt'")
    else:
        hint = ""
        if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            hint = "; prompt and completion are read as conversations where they are lists of messages, and as texts "
            hint += "without --chat"
        raise DataError(f"{source}: the {kind} 'messages' is missing (found: {', '.join(row) or 'none'}){hint}")
    if learnt:
        check_turns(messages, where)
    return messages


def _tools(row: Mapping[str, Any], source: str, kind: str) -> list[dict[str, Any]] | None:
    """JSON schemas of what the assistant may call."""
    where = f"{source}: the {kind} 'tools'"
    tools = parsed(row.get("tools") or None, where)
    check_json(tools, where)
    if tools is not None and not isinstance(tools, list):
        raise DataError(
            f"{where} must be a list of JSON schemas of functions, or its JSON text, got {json_name(tools)}"
        )
    for number, tool in enumerate(tools or [], start=1):
        if not isinstance(tool, dict):
            raise DataError(f"{where}: number {number} must be the JSON schema of a function, got {json_name(tool)}")
    return tools


def _template_kwargs(row: Mapping[str, Any], source: str, kind: str) -> dict[str, Any] | None:
    """What else the chat template is told, such as `{"enable_thinking": false}`."""
    where = f"{source}: the {kind} 'chat_template_kwargs'"
    given = parsed(row.get("chat_template_kwargs") or None, where)
    if given is None:
        return None
    check_json(given, where)
    if not isinstance(given, dict):
        raise DataError(f"{where} must be an object, or its JSON text, got {json_name(given)}")
    if ours := sorted(OURS & given.keys()):
        raise DataError(f"{where} has {ours[0]!r}, which is no variable of a template, or not for a row to say")
    return given
