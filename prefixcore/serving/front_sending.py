"""The answer to an adapter's request on its way to the client."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from .asgi import Message, Send, sized
from .catalog import Served
from .front_answers import Answered, Lines, to_json
from .front_requests import COMPLETIONS
from .openai_errors import Refusal, error_body, error_event

_TOO_LONG = "maximum context length"


class AdapterSend:
    """An ASGI `send` that corrects what passes through it.

    A whole answer is kept until it is complete; a stream passes line by line. An answer that says that the server has
    failed gets words.

    Args:
        send: the client's.
        answered: the request.
        explain: why vLLM has failed a request for an adapter.
        path: the endpoint.
        hold_failure: keep a failure, so that the request can be tried again.

    Attributes:
        is_held: whether a failure is kept, and nothing was sent.
    """

    def __init__(
        self,
        send: Send,
        answered: Answered,
        explain: Callable[[Served], str],
        path: str = COMPLETIONS,
        *,
        hold_failure: bool = False,
    ) -> None:
        self._send, self._answered, self._explain, self._path = send, answered, explain, path
        self._hold_failure = hold_failure
        self._start: Message = {}
        self._body = b""
        self._lines = Lines()
        self._is_stream = self._is_sent = self._is_over = False
        self._events = 0
        self.is_held = False

    async def __call__(self, message: Message) -> None:
        """Takes the next message of the application."""
        if message["type"] == "http.response.start":
            self._start = message
            types = [value for name, value in message.get("headers", []) if name.lower() == b"content-type"]
            self._is_stream = any(value.startswith(b"text/event-stream") for value in types)
            adapter = self._answered.adapter
            message["headers"] = [
                *message.get("headers", []),
                (b"x-prefixcore-adapter", quote(adapter.name).encode()),
                (b"x-prefixcore-digest", adapter.digest.encode()),
            ]
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._is_stream:
            await self._pass(message.get("body", b""), more=message.get("more_body", False))
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._whole()

    async def release(self) -> None:
        """Sends the failure that is held."""
        self.is_held = self._hold_failure = False
        if self._is_stream:
            await self._pass(self._body, more=False)
        else:
            await self._whole()

    async def break_off(self) -> bool:
        """Ends a stream that the application has left unfinished, with an error; False: there is none."""
        if not self._is_sent or self._is_over:
            return False
        event = b"event: error\n" + self._failed_line() + b"\n\n"
        await self._send({"type": "http.response.body", "body": event, "more_body": False})
        return True

    async def _whole(self) -> None:
        if self._start["status"] >= 500:
            if self._hold_failure:
                self.is_held = True
                return
            await self._whole_body(to_json(error_body(self._failure(), self._path)))
            return
        try:
            answer = json.loads(self._body)
        except ValueError:
            await self._whole_body(self._body)
            return
        if self._start["status"] >= 400:
            self._tell_of_virtual_tokens(answer)
        await self._whole_body(to_json(self._answered.correct(answer)))

    def _tell_of_virtual_tokens(self, answer: Any) -> None:
        """A prompt that is too long by vLLM's count is longer than what the client has sent."""
        error = answer.get("error") if isinstance(answer, dict) else None
        if not isinstance(error, dict):
            return
        # Of a prompt with images, which is counted later, vLLM says it in words alone.
        if error.get("param") in ("input_tokens", "input_text") or _TOO_LONG in str(error.get("message")):
            adapter = self._answered.adapter
            virtual = f"{adapter.num_virtual_tokens} of these tokens are the virtual ones of {adapter.name!r}"
            error["message"] = f"{error.get('message')} {virtual}."

    async def _whole_body(self, body: bytes) -> None:
        await self._send({**self._start, "headers": sized(self._start["headers"], body)})
        await self._send({"type": "http.response.body", "body": body})

    async def _pass(self, piece: bytes, *, more: bool) -> None:
        if self.is_held:
            self._body += piece
            return
        lines: list[bytes] = []
        for line in self._lines.feed(piece, last=not more):
            if _is_failure(line):
                if self._hold_failure and not self._is_sent and not any(lines):
                    self.is_held, self._body = True, line + b"\n"
                    continue
                line = self._failed_line()
            if self.is_held:
                self._body += line + b"\n"
            else:
                self._events += line.startswith(b"data:")
                lines.append(self._answered.event(line))
        if self.is_held or (more and not lines):
            return
        await self._begin()
        self._is_over = not more
        body = b"".join(line + b"\n" for line in lines)
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _begin(self) -> None:
        if not self._is_sent:
            self._is_sent = True
            await self._send(self._start)

    def _failure(self) -> Refusal:
        return Refusal(self._explain(self._answered.adapter), status=500, param="model", code="adapter_failed")

    def _failed_line(self) -> bytes:
        return b"data: " + to_json(error_event(self._failure(), self._path, self._events))


def _is_failure(line: bytes) -> bool:
    """Whether a line of a stream says that the server has failed."""
    if not line.startswith(b"data:") or b'"error"' not in line:
        return False
    try:
        answer = json.loads(line[len(b"data:") :])
    except ValueError:
        return False
    if not isinstance(answer, dict):
        return False
    error = answer.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return answer.get("type") == "error" or (isinstance(code, int) and code >= 500)
