"""Asking the server that is validated: the same request to whatever stack, and what can be read out of its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .client import Client, ServingError, choices_of

_PLAIN = {"top_p": 1, "frequency_penalty": 0, "presence_penalty": 0}
_VLLM = {"repetition_penalty": 1.0, "top_k": 0, "min_p": 0.0, "return_token_ids": True}
"""What vLLM would else take from the model's `generation_config.json`; and that it says which tokens it has made."""

AT_ONCE = 8
"""Requests that a server is sent side by side."""


@dataclass
class Answered:
    """A server's answer.

    Attributes:
        text: what it has written.
        ids: its tokens; None: it does not say them.
        logprobs: of each token; None: it does not say them.
        finish: "stop" at an end, "length" at the limit.
        cached: how many tokens of the prompt it had in its cache; None: it does not say.
        prompt_tokens: how many it counts.
    """

    text: str
    ids: list[int] | None = None
    logprobs: list[float] | None = None
    finish: str | None = None
    cached: int | None = None
    prompt_tokens: int | None = None


@dataclass
class Asker:
    """Asks one server, greedily.

    Attributes:
        client: of the server.
        tokens: how many tokens an answer may have.
        extras: fields beyond OpenAI's, as long as the server takes them.
    """

    client: Client
    tokens: int = 16
    extras: dict[str, Any] = field(default_factory=lambda: dict(_VLLM))

    def complete(self, model: str, prompt: str, **options: Any) -> Answered:
        """The answer to a prompt."""
        body = {"prompt": prompt, "logprobs": 1, **options}
        return _completion(self._ask("/v1/completions", model, body))

    def chat(self, model: str, text: str) -> Answered:
        """The answer to a user's words."""
        body = {"messages": [{"role": "user", "content": text}], "logprobs": True}
        return _chat(self._ask("/v1/chat/completions", model, body))

    def stream(self, model: str, prompt: str) -> Answered:
        """The answer to a prompt, in pieces."""
        request = self._request(model, {"prompt": prompt, "stream": True})
        found = Answered("", [])
        for event in self.client.events("/v1/completions", request):
            for choice in event.get("choices") or ():
                found.text += choice.get("text") or ""
                ids = choice.get("token_ids")
                if isinstance(ids, list) and found.ids is not None:
                    found.ids += ids
                found.finish = choice.get("finish_reason") or found.finish
        found.ids = found.ids or None
        return found

    def version(self) -> str | None:
        """What the server says that it is."""
        try:
            answer = self.client.ask("GET", "/version")
        except ServingError:
            return None
        return f"vLLM {answer['version']}" if isinstance(answer, dict) and "version" in answer else None

    def _request(self, model: str, body: dict[str, Any]) -> dict[str, Any]:
        return {"model": model, "max_tokens": self.tokens, "temperature": 0, **_PLAIN, **self.extras, **body}

    def _ask(self, path: str, model: str, body: dict[str, Any]) -> Any:
        return self.client.ask("POST", path, self._request(model, body))

    def try_extras(self, model: str) -> None:
        """Finds out whether the server takes fields beyond OpenAI's, and leaves them out from here on if not."""
        try:
            self.complete(model, "x")
        except ServingError as error:
            if error.status not in (400, 422):
                raise
            self.extras = {}


def attempt(ask: Callable[..., Answered], model: str, prompt: str) -> Answered | str:
    """The answer, or in words why there is none."""
    try:
        return ask(model, prompt)
    except ServingError as error:
        return str(error)


def _completion(answer: Any) -> Answered:
    choice = choices_of(answer)[0]
    text = choice.get("text")
    if not isinstance(text, str):
        raise ServingError(f"expected a text in the answer, got {str(answer)[:200]}")
    found = choice.get("logprobs")
    values = found.get("token_logprobs") if isinstance(found, dict) else None
    return _answered(text, choice, answer, values)


def _chat(answer: Any) -> Answered:
    choice = choices_of(answer)[0]
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    found = choice.get("logprobs")
    content = found.get("content") if isinstance(found, dict) else None
    values = [one.get("logprob") for one in content] if isinstance(content, list) else None
    return _answered(text or "", choice, answer, values)


def _answered(text: str, choice: dict[str, Any], answer: Any, values: Any) -> Answered:
    ids = choice.get("token_ids")
    is_list = isinstance(values, list) and all(isinstance(value, (int, float)) for value in values)
    usage = answer.get("usage") if isinstance(answer.get("usage"), dict) else {}
    details = usage.get("prompt_tokens_details")
    return Answered(
        text,
        [int(i) for i in ids] if isinstance(ids, list) else None,
        [float(value) for value in values] if is_list else None,
        choice.get("finish_reason"),
        details.get("cached_tokens") if isinstance(details, dict) else None,
        usage.get("prompt_tokens"),
    )
