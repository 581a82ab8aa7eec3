"""ShareGPT's conversations, `{"from": ..., "value": ...}`, as messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .data import DataError
from .json_values import json_name, parsed, shown
from .messages import ASSISTANT

CALL = "function_call"
"""Whose value is the JSON of a call, or of a list of calls."""

ROLES = {
    "human": "user", "user": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "assistant": ASSISTANT, CALL: ASSISTANT,
    "system": "system", "tool": "tool", "function": "tool", "function_response": "tool", "observation": "tool",
}  # fmt: skip
"""Who speaks -> the role that chat templates know."""


def to_messages(turns: Any, system: Any, where: str) -> Any:
    """Turns as messages; those that are messages already stay as they are, and whatever else they hold is kept.

    Args:
        turns: as they were read.
        system: the text that stands before them in a column of its own; None: there is none.
        where: what a message about them begins with.

    Raises:
        DataError: somebody speaks whose role is not known, or a call is not one.
    """
    turns = parsed(turns, where)
    if not isinstance(turns, list):
        raise DataError(f'{where} must be a list of {{"from": ..., "value": ...}}, got {json_name(turns)}')
    messages = [_message(turn, f"{where}: message {number}") for number, turn in enumerate(turns, start=1)]
    if not system:
        return messages
    if not isinstance(system, str):
        raise DataError(f"{where}: the system message beside it must be a string, got {json_name(system)}")
    if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
        if messages[0].get("content") == system:
            return messages
        raise DataError(f"{where}: begins with a system message, and has another one beside it; leave one of them")
    return [{"role": "system", "content": system}, *messages]


def _message(turn: Any, where: str) -> Any:
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise DataError(f"{where}: is from {shown(speaker)}; expected one of {', '.join(ROLES)}")
    others = {name: value for name, value in turn.items() if name not in ("from", "value")}
    said = {"role": ROLES[speaker], **others}
    if speaker != CALL:
        return {**said, "content": turn.get("value")}
    calls = parsed(turn.get("value"), f"{where}: the call")
    return {**said, "tool_calls": calls if isinstance(calls, list) else [calls]}
