"""The few things that a middleware does in ASGI, the interface between a Python web server and its application."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass
class Answer:
    """An answer of an application.

    Attributes:
        status: of HTTP.
        headers: names in lower case, and values.
        body: all of it.
    """

    status: int = 500
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""

    async def send(self, send: Send) -> None:
        """Gives this answer."""
        await send({"type": "http.response.start", "status": self.status, "headers": sized(self.headers, self.body)})
        await send({"type": "http.response.body", "body": self.body})


def sized(headers: list[tuple[bytes, bytes]], body: bytes) -> list[tuple[bytes, bytes]]:
    """The headers with the size of another body."""
    kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [*kept, (b"content-length", str(len(body)).encode())]


def json_answer(body: bytes, status: int = 200) -> Answer:
    """An answer of JSON."""
    return Answer(status, [(b"content-type", b"application/json")], body)


class Gone(Exception):
    """The client has closed the connection before its request was whole."""


async def read_body(receive: Receive) -> bytes:
    """The whole body of a request.

    Raises:
        Gone: the client has gone.
    """
    pieces = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)


def with_body(scope: Scope, receive: Receive, body: bytes, **changes: Any) -> tuple[Scope, Receive]:
    """The scope and the `receive` of a request with another body; afterwards `receive` says when the client goes."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return {**scope, "headers": sized(list(scope["headers"]), body), **changes}, replay


async def ask(app: App, scope: Scope, method: str, path: str, body: bytes = b"") -> Answer:
    """What the application answers to another request of the same client, with its headers and so its API key."""
    found = Answer()
    kept = [(name, value) for name, value in scope["headers"] if name.lower() != b"accept-encoding"]
    inner: Scope = {
        **scope,
        "headers": kept,
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "state": dict(scope.get("state", {})),
    }

    async def never() -> Message:  # who waits for the client to go waits for this
        return await asyncio.get_running_loop().create_future()

    async def collect(message: Message) -> None:
        if message["type"] == "http.response.start":
            found.status, found.headers = message["status"], list(message.get("headers", []))
        elif message["type"] == "http.response.body":
            found.body += message.get("body", b"")

    inner, receive = with_body(inner, never, body)
    await app(inner, receive, collect)
    return found
