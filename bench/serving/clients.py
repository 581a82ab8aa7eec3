"""Clients of an OpenAI-compatible server: each sends its next request as soon as the last is answered."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import httpx

TOKENS = 16
"""How many tokens each request asks for; a model that would stop earlier is told not to."""


@dataclass(frozen=True)
class Request:
    """What is asked, and of which model or adapter."""

    model: str
    prompt: str


@dataclass(frozen=True)
class Answer:
    """Seconds until the first token and until the last."""

    first: float
    whole: float


@dataclass(frozen=True)
class Load:
    """One round: all answers, and the seconds that it took."""

    answers: Sequence[Answer]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.answers) * TOKENS / self.seconds


def drive(url: str, requests: Sequence[Request], clients: int, number: int) -> Load:
    """Sends `number` requests, `clients` at a time, going round `requests`."""
    return asyncio.run(_drive(url, requests, clients, number))


async def _drive(url: str, requests: Sequence[Request], clients: int, number: int) -> Load:
    waiting = iter([request for request, _ in zip(cycle(requests), range(number), strict=False)])
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        began = time.perf_counter()
        answers = await asyncio.gather(*(_client(http, waiting) for _ in range(clients)))
        seconds = time.perf_counter() - began
    return Load([answer for part in answers for answer in part], seconds)


async def _client(http: httpx.AsyncClient, waiting: Iterator[Request]) -> list[Answer]:
    return [await ask(http, request) for request in waiting]


async def ask(http: httpx.AsyncClient, request: Request) -> Answer:
    """One request, streamed.

    Raises:
        RuntimeError: the server refuses it, or answers with another number of tokens.
    """
    body = {
        "model": request.model,
        "prompt": request.prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, tokens = time.perf_counter(), 0.0, 0
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            raise RuntimeError(f"{request.model}: HTTP {response.status_code}: {text}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(f"{request.model}: {event['error']}")
            if event.get("choices") and not first:
                first = time.perf_counter() - began
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    if tokens != TOKENS:
        raise RuntimeError(f"{request.model}: expected {TOKENS} tokens, got {tokens}")
    return Answer(first, time.perf_counter() - began)
