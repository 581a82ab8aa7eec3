"""A server with OpenAI's interface and a small model behind it, right or wrong in ways that servers are."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prefixcore.serving.validate_reference import Reference
from tests import tiny

BASE = "tiny-base"


class Stack:
    """A right one: every adapter by its name, all else refused.

    Args:
        adapters: the adapters' folders, by name.
        says_ids: whether it says which tokens it has made, as vLLM does; else it takes OpenAI's fields alone.
    """

    says_ids = True

    def __init__(self, adapters: dict[str, Path], *, says_ids: bool = True) -> None:
        self.reference = Reference(tiny.model(), tiny.tokenizer(), adapters)
        self.says_ids = says_ids
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []

    def resolve(self, name: str, body: dict[str, Any]) -> str | None:
        """Whose answer a request gets; KeyError: nobody's."""
        if name == BASE:
            return None
        if name not in self.reference.names:
            raise KeyError(name)
        return name

    def refuse(self, body: dict[str, Any]) -> str | None:
        """Why a request is refused."""
        if body["model"] != BASE and (body.get("echo") or "prompt_logprobs" in body):
            return "echo and prompt_logprobs drop the prefix"
        if not self.says_ids and "return_token_ids" in body:
            return "return_token_ids: extra fields are not permitted"
        return None

    def models(self) -> Any:
        cards = [{"id": BASE, "object": "model"}]
        return {"object": "list", "data": cards + [{"id": name, "parent": BASE} for name in self.reference.names]}

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON."""
        with self.lock:
            self.requests.append(body)
            if why := self.refuse(body):
                return 400, {"error": {"message": why, "type": "invalid_request_error"}}
            try:
                name = self.resolve(body["model"], body)
            except KeyError:
                return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
            ids, logprobs = self.reference.continuation(name, self.reference.ids(body["prompt"]), body["max_tokens"])
            text = self.reference.text(ids)
        finish = "length" if len(ids) == body["max_tokens"] else "stop"
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": finish}
        choice["logprobs"] = {"token_logprobs": logprobs, "tokens": [self.reference.text([i]) for i in ids]}
        if body.get("echo"):
            choice["text"] = body["prompt"] + text
        if self.says_ids:
            choice["token_ids"] = ids
        return 200, {"model": body["model"], "choices": [choice]}


class OneForAll(Stack):
    """Answers with the bare model whatever it is asked for."""

    def resolve(self, name: str, body: dict[str, Any]) -> str | None:
        return None


class Plain(Stack):
    """Knows the bare model alone."""

    def resolve(self, name: str, body: dict[str, Any]) -> str | None:
        if name != BASE:
            raise KeyError(name)
        return None

    def models(self) -> Any:
        return {"object": "list", "data": [{"id": BASE, "object": "model"}]}


class Mixed(Stack):
    """Takes two adapters for one another."""

    def resolve(self, name: str, body: dict[str, Any]) -> str | None:
        found = super().resolve(name, body)
        names = self.reference.names
        return names[1 - names.index(found)] if found in names[:2] else found


class Leaky(Stack):
    """Answers a text that it has seen with whatever it was seen under, as a cache without salt does."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seen: dict[str, str | None] = {}

    def resolve(self, name: str, body: dict[str, Any]) -> str | None:
        found = super().resolve(name, body)
        return self.seen.setdefault(body["prompt"], found) if len(body["prompt"]) > 30 else found


class Dropping(Stack):
    """Drops the prefix where the prompt's own log-probabilities are asked for."""

    def refuse(self, body: dict[str, Any]) -> str | None:
        return None

    def resolve(self, name: str, body: dict[str, Any]) -> str | None:
        found = super().resolve(name, body)
        return None if body.get("echo") or "prompt_logprobs" in body else found


class Rounded(Stack):
    """Says log-probabilities that are off by a tenth."""

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        status, found = super().answer(body)
        if status == 200:
            logprobs = found["choices"][0]["logprobs"]
            logprobs["token_logprobs"] = [value - 0.1 for value in logprobs["token_logprobs"]]
        return status, found


@contextmanager
def serving(stack: Any) -> Iterator[str]:
    """The address of a server for the block: a `Stack`, or what else has its `models` and `answer`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            """Nothing is printed."""

        def do_GET(self) -> None:
            found = stack.models() if self.path == "/v1/models" else None
            self._send(200 if found else 404, found or {"detail": "Not Found"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/completions":
                self._send(404, {"detail": "Not Found"})
                return
            status, found = stack.answer(body)
            if status == 200 and body.get("stream"):
                self._stream(found)
            else:
                self._send(status, found)

        def _send(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _stream(self, found: Any) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            choice = found["choices"][0]
            for i, letter in enumerate(choice["text"]):
                piece = {"text": letter, "finish_reason": None}
                if "token_ids" in choice:  # one token a character
                    piece["token_ids"] = choice["token_ids"][i : i + 1]
                self.wfile.write(f"data: {json.dumps({'choices': [piece]})}\n\n".encode())
            last = {"choices": [{"text": "", "finish_reason": choice["finish_reason"]}]}
            self.wfile.write(f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n".encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    with running(server) as address:
        yield address


@contextmanager
def running(server: socketserver.BaseServer) -> Iterator[str]:
    """The address of a server that answers in a thread of its own, for the block."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def saying(raw: bytes) -> Iterator[str]:
    """The address of something that answers every connection with these bytes."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(raw)

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    with running(server) as address:
        yield address


def http_answer(body: str, status: str = "200 OK") -> bytes:
    """The bytes of an answer of HTTP."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body.encode())}\r\nConnection: close\r\n\r\n{body}".encode()
