"""Messages as the model's chat template writes them, in the form that it reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .data import DataError
from .messages import text_of

OURS = frozenset(
    {
        "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages",
        "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens", "self",
        "tokenize", "tokenizer_kwargs", "tools", "truncation",
    }
)  # fmt: skip
"""Arguments of `apply_chat_template` that no row says."""

LONGEST = 300
"""Characters of what a template says that are shown."""

_PROBE = "a text that is looked for"


def check_template(tokenizer: Any) -> None:
    """Raises DataError if the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the model's tokenizer has no chat template, so messages cannot be written for it; take a model that has "
            "one, as those made for chats do, or data with prompt and completion"
        )


def write_turns(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    source: str,
    *,
    add_generation_prompt: bool,
    given: Mapping[str, Any] | None = None,
) -> str:
    """Messages as the model's chat template writes them.

    Args:
        tokenizer: with a chat template.
        messages: from `check_messages`.
        source: what a message about them begins with.
        add_generation_prompt: whether the assistant is asked to answer.
        given: what else the template is told, such as `tools`.

    Raises:
        DataError: the tokenizer has no template, or it refuses the messages.
    """
    check_template(tokenizer)
    told = {**(given or {}), "add_generation_prompt": add_generation_prompt}
    errors: list[Exception] = []
    for form in _forms(_as_read(tokenizer, messages)):
        try:
            return _write(tokenizer, form, told)
        except _Refused as refused:
            errors.append(refused.error)
    lines = str(errors[0]).splitlines() or [type(errors[0]).__name__]
    raise DataError(f"{source}: the model's chat template refuses the messages: {lines[0][:LONGEST]}") from errors[0]


def _forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Messages as most templates read them, then, where tools are called, as others do.

    Some read the content of every message, also where there is none; DeepSeek's adds the arguments of a call to a text.
    """
    yield messages
    if any("tool_calls" in message for message in messages):
        with_contents = [{"content": "", **message} for message in messages]
        yield with_contents
        yield [_with_written_arguments(message) for message in messages]
        yield [_with_written_arguments(message) for message in with_contents]


class _Refused(Exception):
    """A template does not write what it is given, for the reason that `error` gives."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


def _write(tokenizer: Any, messages: Sequence[dict[str, Any]], told: Mapping[str, Any]) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **told))
    except MemoryError:
        raise
    except Exception as error:  # a template is a program of the model's author: it raises what it likes
        raise _Refused(error) from error


def _as_read(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without what is ours, and with contents as the template reads them: texts, or lists of parts."""
    reads_texts, reads_parts = _reads(tokenizer, _PROBE), _reads(tokenizer, [{"type": "text", "text": _PROBE}])
    read = []
    for message in messages:
        message = {name: value for name, value in message.items() if name != "weight"}
        content = message.get("content")
        if isinstance(content, list) and not reads_parts:
            message["content"] = text_of(message)
        elif isinstance(content, str) and reads_parts and not reads_texts:
            message["content"] = [{"type": "text", "text": content}]
        read.append(message)
    return read


def _reads(tokenizer: Any, content: Any) -> bool:
    """Whether the template writes the text of such a content, and not what Python or JSON calls a list of parts."""
    try:
        text = _write(tokenizer, [{"role": "user", "content": content}], {"add_generation_prompt": False})
    except _Refused:
        return False
    return _PROBE in text and f"'{_PROBE}'" not in text and f'"{_PROBE}"' not in text


def _with_written_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls have the JSON text of their arguments, with white space as templates write JSON."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}
