"""A stand-in for vLLM's application: its endpoints as far as the front asks them, over one token a character.

What it was asked is kept in `asked`, and its answers have the shape and the fields of vLLM 0.32's.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

BASE = "tiny-base"
FIRST_ID = 100
"""The id of the character with code 0, so that no id is a placeholder."""


def ids_of(text: str) -> list[int]:
    return [FIRST_ID + ord(character) for character in text]


@dataclass(frozen=True)
class Place:
    """Where an image stands, vLLM's `PlaceholderRange`."""

    offset: int
    length: int


class Renderer:
    """vLLM's renderer as far as prompts with media go: what it makes of each of them, and how it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.media = "image"

    async def process_for_engine_async(self, prompt: Any, arrival_time: float, **options: Any) -> dict[str, Any]:
        self.asked.append((prompt, arrival_time, options))
        places = {self.media: [Place(2, 3), Place(6, 1)]}
        made = {"type": "multimodal", "prompt_token_ids": ids_of("a IMG I b"), "mm_placeholders": places}
        return {**made, "cache_salt": prompt["cache_salt"]} if prompt.get("cache_salt") else made


@dataclass
class FakeVllm:
    """An ASGI application.

    Attributes:
        key: the API key that it wants; None: none.
        failures: how many requests with a salt fail, as those that a connector refuses do.
        on_failure: called when one fails.
        asked: path and body of every POST request that came through.
        rendered: prompts of messages with images, as the engine gets them.
        state: of vLLM's server.
    """

    key: str | None = None
    failures: int = 0
    on_failure: Any = None
    asked: list[tuple[str, Any]] = field(default_factory=list)
    rendered: list[dict[str, Any]] = field(default_factory=list)
    state: Any = field(default_factory=lambda: SimpleNamespace(engine_client=SimpleNamespace(renderer=Renderer())))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.key and dict(scope["headers"]).get(b"authorization") != f"Bearer {self.key}".encode():
            await answer(send, 401, {"error": "Unauthorized"})
            return
        path = scope["path"]
        if scope["method"] == "GET":
            card = {"id": BASE, "object": "model", "root": "/models/tiny", "parent": None, "max_model_len": 64}
            found = {"/v1/models": {"object": "list", "data": [card]}, "/health": {}}.get(path)
            await answer(send, 200 if found is not None else 404, found)
            return
        message = await receive()
        assert not message.get("more_body")
        body = json.loads(message["body"])
        self.asked.append((path, body))
        if body.get("model") not in (None, BASE):
            text = f"The model `{body['model']}` does not exist."
            await answer(
                send, 404, {"error": {"message": text, "type": "NotFoundError", "param": "model", "code": 404}}
            )
        elif path.endswith("/render"):
            await self._render(body, path, send)
        elif path in ("/v1/completions", "/v1/chat/completions"):
            await self._complete(body, path, send)
        elif path in ("/v1/responses", "/v1/messages"):
            await self._respond(body, path, send)
        else:
            await answer(send, 200, {"model": BASE, "path": path})

    async def _render(self, body: Any, path: str, send: Any) -> None:
        if body.get("max_tokens", 0) > 1000:
            error = {"message": "max_tokens: too many", "type": "BadRequestError", "param": "max_tokens", "code": 400}
            await answer(send, 400, {"error": error})
            return
        if "responses" in path:
            await answer(send, 200, {"token_ids": ids_of(f"<user>{body['input']}<assistant>"), "features": None})
            return
        if "chat" in path or "messages" in path:
            text = "".join(f"<{m['role']}>{m['content']}" for m in body["messages"]) + "<assistant>"
            await answer(send, 200, {"token_ids": ids_of(text), "features": None})
            return
        prompt = body.get("prompt")
        if not prompt:
            await answer(send, 400, {"error": {"message": "prompt: missing", "type": "BadRequestError", "code": 400}})
            return
        many = prompt if isinstance(prompt, list) and isinstance(prompt[0], (str, list)) else [prompt]
        cut = body.get("truncate_prompt_tokens") or 0
        rendered = [(ids_of(one) if isinstance(one, str) else one)[-cut:] for one in many]
        await answer(send, 200, [{"token_ids": ids, "features": None} for ids in rendered])

    async def _complete(self, body: Any, path: str, send: Any) -> None:
        is_chat = "chat" in path
        if self.failures and body.get("cache_salt"):
            self.failures -= 1
            if self.on_failure is not None:
                self.on_failure()
            error = {"error": {"message": "Internal server error", "type": "InternalServerError", "code": 500}}
            if body.get("stream"):
                await stream(send, [error])
            else:
                await answer(send, 500, error)
            return
        if is_chat:
            prompts = [await self._ids_of_messages(body)]
        else:
            prompt = body["prompt"]
            prompts = prompt if isinstance(prompt, list) and isinstance(prompt[0], (str, list)) else [prompt]
            prompts = [ids_of(one) if isinstance(one, str) else one for one in prompts]
        total = sum(map(len, prompts))
        usage = {"prompt_tokens": total, "completion_tokens": 2, "total_tokens": total + 2}
        usage["prompt_tokens_details"] = {"cached_tokens": total - 1}
        shared = {"id": "cmpl-1", "model": BASE, "object": "chat.completion" if is_chat else "text_completion"}
        if not body.get("stream"):
            if is_chat:
                choices = [{"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}]
                await answer(send, 200, {**shared, "choices": choices, "usage": usage, "prompt_token_ids": prompts[0]})
                return
            choices = [
                {"index": i, "text": "ok", "finish_reason": "stop", "prompt_token_ids": ids}
                for i, ids in enumerate(prompts)
            ]
            await answer(send, 200, {**shared, "choices": choices, "usage": usage})
            return
        events: list[Any] = []
        for i, ids in enumerate(prompts):
            delta = {"index": i, "delta": {"content": "ök"}} if is_chat else {"index": i, "text": "ök"}
            so_far = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
            events.append({**shared, "choices": [delta], "usage": so_far})
        await stream(send, [*events, {**shared, "choices": [], "usage": usage}])

    async def _ids_of_messages(self, body: Any) -> list[int]:
        """Those that are handed over; else, in a task of its own as vLLM's, what the renderer makes of the messages."""
        handed = body.get("kv_transfer_params")
        if handed is not None:
            return handed["prompt_token_ids"]
        render = self.state.engine_client.renderer.process_for_engine_async
        self.rendered.append(await asyncio.create_task(render(body, 1.5, skip_mm_cache=False)))
        return self.rendered[-1]["prompt_token_ids"]

    async def _respond(self, body: Any, path: str, send: Any) -> None:
        """OpenAI's Responses and Anthropic's Messages; all but ten tokens are in cached blocks."""
        total = len(await self._ids_of_messages(body))
        cached = max(0, total - 10)
        failed = self.failures > 0
        self.failures -= failed
        if "responses" in path:
            usage: Any = {"input_tokens": total, "output_tokens": 1, "total_tokens": total + 1}
            usage["input_tokens_details"] = {"cached_tokens": cached, "input_tokens_per_turn": [total]}
            whole = {"object": "response", "model": BASE, "usage": usage, "output": "ok"}
            first: Any = {"type": "response.created", "response": {**whole, "usage": None}}
            last: Any = {"type": "response.completed", "response": whole}
        else:
            usage = {"input_tokens": total - cached, "output_tokens": 1, "cache_read_input_tokens": cached}
            whole = {"type": "message", "model": BASE, "usage": usage, "content": "ok"}
            first = {"type": "message_start", "message": whole}
            last = {"type": "message_delta", "usage": usage}
        if not body.get("stream"):
            await answer(
                send, 500 if failed else 200, {"error": {"message": "Internal server error"}} if failed else whole
            )
        elif not failed:
            await stream(send, [first, last])
        elif "responses" in path:  # as vLLM 0.32 does
            await send(
                {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
            )
            data = f"event: response.created\ndata: {json.dumps(first)}\n\n".encode()
            await send({"type": "http.response.body", "body": data, "more_body": True})
            raise RuntimeError("no such event")
        else:
            await stream(send, [first, {"type": "error", "error": {"type": "internal_error", "message": "oh"}}])


async def answer(send: Any, status: int, body: Any) -> None:
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


async def stream(send: Any, events: list[Any]) -> None:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    data = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events) + "data: [DONE]\n\n"
    raw = data.encode()
    for start in range(0, len(raw), 7):  # pieces that end within lines and within characters
        await send({"type": "http.response.body", "body": raw[start : start + 7], "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@dataclass
class Reply:
    """What a client gets."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The JSON of a stream's events, without the last line."""
        lines = [line for line in self.text.split("\n") if line]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def call(
    app: Any, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, application: Any = None
) -> Reply:
    """One request to an ASGI application, as a web server makes it; `application`: the one with vLLM's state."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    sent: list[Any] = []
    named = {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}
    scope = {
        "type": "http",
        "app": application,
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in named.items()],
    }
    pieces = [data[i : i + 50] for i in range(0, len(data), 50)] or [b""]

    async def receive() -> Any:
        if pieces:
            piece = pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}
        return await asyncio.get_running_loop().create_future()

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    start, *rest = sent
    assert start["type"] == "http.response.start"
    raw = b"".join(message.get("body", b"") for message in rest)
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    if "content-length" in found:
        assert int(found["content-length"]) == len(raw)
    return Reply(start["status"], found, raw.decode())
