"""A client of a server of adapters, on the standard library alone.

    client = Client("http://127.0.0.1:8000")
    client.generate("capitals", "Portugal ->", max_tokens=8)

The `openai` package does the same, and everything else of the interface.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any, overload

from .openai_errors import error_message

__all__ = ["Client", "ServingError"]

_LONGEST = 300


class ServingError(RuntimeError):
    """The server refused a request, failed, or could not be asked; the message says what came.

    Attributes:
        status: of HTTP; None: there was no answer.

    Examples:
        >>> from prefixcore.serving.client import Client, ServingError
        >>> try:
        ...     Client("http://127.0.0.1:9").generate("capitals", "Portugal ->")
        ... except ServingError as error:
        ...     print(error.status)
        None
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """A server with OpenAI's interface.

    Args:
        url: its address, with or without `/v1`.
        api_key: where the server wants one; None: the environment's `OPENAI_API_KEY`, if there is one.
        timeout: seconds without a byte from the server.

    Raises:
        ValueError: an address that is none.

    Examples:
        >>> from prefixcore.serving.client import Client, ServingError
        >>> try:
        ...     Client("http://127.0.0.1:9").models()
        ... except ServingError as error:
        ...     print(str(error).partition(":")[0])
        http
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 600.0) -> None:
        parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ValueError(f"url: expected an address such as http://127.0.0.1:8000, got {url!r}")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self._host, self._port, self._secure = parts.hostname, port, parts.scheme == "https"
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._timeout = timeout
        key = os.environ.get("OPENAI_API_KEY") if api_key is None else api_key
        self._headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def models(self) -> list[str]:
        """The names of what the server answers with: the base model, and each adapter."""
        return [str(card.get("id")) for card in self.model_cards()]

    def model_cards(self) -> list[dict[str, Any]]:
        """What the server says of each of them."""
        answer = self.ask("GET", "/v1/models")
        cards = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise ServingError(f"{self.url}/v1/models: expected a list of models, got {_shown(answer)}")
        return cards

    @overload
    def generate(self, model: str, prompt: str, **options: Any) -> str: ...
    @overload
    def generate(self, model: str, prompt: Sequence[str], **options: Any) -> list[str]: ...
    def generate(self, model: str, prompt: str | Sequence[str], **options: Any) -> str | list[str]:
        """The text after a prompt, the likeliest unless `temperature` says otherwise.

        Args:
            model: an adapter's name, or the base model's.
            prompt: a text, or several.
            options: of OpenAI's completions: `max_tokens`, `stop`, `temperature`, `seed`, ...

        Raises:
            ServingError: the server refuses or fails, or there is none.
        """
        answer = self.ask("POST", "/v1/completions", _request(model, options, prompt=_prompt(prompt)))
        choices = sorted(choices_of(answer), key=lambda choice: choice.get("index", 0))
        texts = [_text(choice.get("text")) for choice in choices]
        return texts[0] if isinstance(prompt, str) else texts

    def stream(self, model: str, prompt: str, **options: Any) -> Iterator[str]:
        """The same, piece by piece as it comes."""
        request = _request(model, options, prompt=prompt, stream=True)
        for event in self.events("/v1/completions", request):
            for choice in event.get("choices") or ():
                if choice.get("text"):
                    yield choice["text"]

    def chat(self, model: str, messages: str | Sequence[dict[str, Any]], **options: Any) -> str:
        """The answer to messages, or to one text of the user's."""
        answer = self.ask("POST", "/v1/chat/completions", _request(model, options, messages=_messages(messages)))
        return _text((choices_of(answer)[0].get("message") or {}).get("content") or "")

    def stream_chat(self, model: str, messages: str | Sequence[dict[str, Any]], **options: Any) -> Iterator[str]:
        """The same, piece by piece as it comes."""
        request = _request(model, options, messages=_messages(messages), stream=True)
        for event in self.events("/v1/chat/completions", request):
            for choice in event.get("choices") or ():
                if text := (choice.get("delta") or {}).get("content"):
                    yield text

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON that the server answers to one request.

        Args:
            method, path: of HTTP; the path begins with `/v1`.
            body: JSON to send.

        Raises:
            ServingError: no answer, one that says that something is wrong, or one that is no JSON.
        """
        with self._answer(method, path, body) as answer:
            data = _read(answer, self.url)
        try:
            return json.loads(data)
        except ValueError:
            text = _shown(data.decode(errors="replace"))
            raise ServingError(f"{self.url}{path}: expected JSON, got {text}") from None

    def events(self, path: str, body: Any) -> Iterator[dict[str, Any]]:
        """The JSON of each event of a stream.

        Raises:
            ServingError: as of `ask`; also while it comes.
        """
        with self._answer("POST", path, body) as answer:
            is_whole = False
            for line in _lines(answer, self.url):
                if not line.startswith(b"data:"):
                    continue
                text = line[len(b"data:") :].strip()
                if text == b"[DONE]":
                    is_whole = True
                    continue
                try:
                    event = json.loads(text)
                except ValueError:
                    raise ServingError(f"{self.url}{path}: expected JSON in the stream, got {_shown(text)}") from None
                if isinstance(event, dict) and event.get("error"):
                    raise ServingError(f"{self.url}: {error_message(event) or _shown(event)}", 500)
                if isinstance(event, dict):
                    yield event
            if not is_whole:
                raise ServingError(f"{self.url}{path}: the stream broke off")

    @contextlib.contextmanager
    def _answer(self, method: str, path: str, body: Any) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        try:
            try:
                data = None if body is None else json.dumps(body).encode()
                connection.request(method, self._root + path, data, self._headers)
                answer = connection.getresponse()
            except TimeoutError:
                raise ServingError(f"{self.url}: no answer within {self._timeout:g} seconds") from None
            except ConnectionRefusedError:
                raise ServingError(f"{self.url}: nothing listens there; is the server started?") from None
            except socket.gaierror:
                raise ServingError(f"{self.url}: there is no machine of the name {self._host}") from None
            except (OSError, http.client.HTTPException) as error:
                raise ServingError(f"{self.url}: no answer of HTTP ({type(error).__name__}: {error})") from None
            if answer.status >= 400:
                raise ServingError(_refused(self.url + path, answer), answer.status)
            yield answer
        finally:
            connection.close()


def _refused(url: str, answer: http.client.HTTPResponse) -> str:
    data = _read(answer, url)
    try:
        message = error_message(json.loads(data))
    except ValueError:
        message = None
    return f"{url}: {message or _shown(data.decode(errors='replace'))} (HTTP {answer.status})"


def _read(answer: http.client.HTTPResponse, url: str) -> bytes:
    try:
        return answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise ServingError(f"{url}: the answer broke off ({type(error).__name__})") from None


def _lines(answer: http.client.HTTPResponse, url: str) -> Iterator[bytes]:
    try:
        yield from answer
    except (OSError, http.client.HTTPException) as error:
        raise ServingError(f"{url}: the stream broke off ({type(error).__name__})") from None


def _request(model: str, options: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"temperature": 0, **options, "model": model, **fields}


def _prompt(prompt: str | Sequence[str]) -> str | list[str]:
    return prompt if isinstance(prompt, str) else list(prompt)


def _messages(messages: str | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)


def choices_of(answer: Any) -> list[dict[str, Any]]:
    """The choices of an answer, at least one; ServingError: it has none."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise ServingError(f"expected an answer with choices, got {_shown(answer)}")
    return choices


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ServingError(f"expected a text in the answer, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
