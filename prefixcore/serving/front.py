"""The front: a middleware of vLLM's own server that lets a client name an adapter as its model, and nothing else.

`vllm ... --middleware prefixcore.serving.front.Front` puts it there; `prefixcore serve` does. It runs in vLLM's
process, so that no request takes another hop. A request whose model is an adapter's name goes on to the base model,
with P placeholders before its tokens and the adapter in its `cache_salt`; vLLM itself says which tokens those are (by
its `render` endpoints, or with images where it renders them), so text, token ids, images and chat templates are read as
ever, and tools, streaming and counting are vLLM's own.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from typing import Any

from ..adapters import AdapterError
from . import asgi
from .asgi import Answer, App, Receive, Scope, Send
from .catalog import Catalog, Served
from .front_answers import Answered, to_json
from .front_images import rendered_behind, teach_renderer
from .front_listing import base_name, listing, model_names, unknown_model
from .front_requests import (
    MESSAGES,
    OFFERED,
    check_request,
    check_salts,
    holds_images,
    render_request,
    rendered_ids,
    to_base,
    with_adapter,
)
from .front_sending import AdapterSend
from .openai_errors import Refusal, error_body, error_message
from .salt import PLACEHOLDER

logger = logging.getLogger("vllm.prefixcore")

MODELS = "/v1/models"
_OF_THE_BASE_MODEL = ("/tokenize", "/detokenize", f"{MESSAGES}/count_tokens")
"""What an adapter does not change, so that its name may stand there for the base model's."""


class Front:
    """An ASGI application around vLLM's.

    Args:
        app: vLLM's application.
        adapters: what is served; None: what the connector in the same server serves.
        placeholder: the token id that stands for a virtual token; None: the connector's.

    Examples:
        >>> from prefixcore.serving.front import Front
        >>> from prefixcore.serving.catalog import Catalog
        >>> async def vllm(scope, receive, send): ...
        >>> app = Front(vllm, Catalog("."))
    """

    def __init__(self, app: App, adapters: Catalog | None = None, placeholder: int | None = None) -> None:
        self.app = app
        self._adapters, self._placeholder = adapters, placeholder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = _path(scope)
        try:
            if self._adapters is None:
                self._configure(scope)
            if scope["method"] in ("GET", "HEAD"):
                await self._get(scope, receive, send, path)
            elif scope["method"] == "POST":
                await self._post(scope, receive, send, path)
            else:
                await self.app(scope, receive, send)
        except asgi.Gone:
            return
        except Refusal as refusal:
            await self._refuse(scope, send, refusal)

    @property
    def adapters(self) -> Catalog:
        """What is served."""
        assert self._adapters is not None
        return self._adapters

    def _configure(self, scope: Scope) -> None:
        from .front_settings import connector_settings

        found = connector_settings(scope)
        self._adapters = found.adapters
        self._placeholder = found.placeholder if self._placeholder is None else self._placeholder

    # -- GET

    async def _get(self, scope: Scope, receive: Receive, send: Send, path: str) -> None:
        if path != MODELS and not path.startswith(f"{MODELS}/"):
            await self.app(scope, receive, send)
            return
        answer, cards = await self._list(scope)
        if cards is not None:
            wanted = path[len(MODELS) + 1 :]
            if not wanted:
                answer = asgi.json_answer(to_json({"object": "list", "data": cards}))
            else:
                found = [card for card in cards if card.get("id") == wanted]
                if not found:
                    raise unknown_model(wanted, cards)
                answer = asgi.json_answer(to_json(found[0]))
        await answer.send(send)

    async def _list(self, scope: Scope) -> tuple[Answer, list[dict[str, Any]] | None]:
        """vLLM's answer about its models; and the cards of them and of the adapters, if it gave any to this client."""
        answer = await asgi.ask(self.app, scope, "GET", MODELS)
        if answer.status != 200:
            return answer, None
        served = await asyncio.to_thread(self.adapters.served)
        return answer, listing(json.loads(answer.body), served)

    # -- POST

    async def _post(self, scope: Scope, receive: Receive, send: Send, path: str) -> None:
        if _is_internal(path):
            raise Refusal(
                f"{path} is not offered: vLLM's scale-out endpoints are open to the front alone",
                status=403,
                code="closed",
            )
        raw = await asgi.read_body(receive)
        scope, again = asgi.with_body(scope, receive, raw)
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):  # vLLM, which reads it in the same way, says what is wrong
            await self.app(scope, again, send)
            return
        check_salts(body)
        name = body.get("model") if isinstance(body, dict) else None
        if not self._is_adapter(scope, name):
            await self._pass_on(scope, again, send, path, name)
            return
        assert isinstance(name, str)
        if path in _OF_THE_BASE_MODEL:
            scope, again = asgi.with_body(scope, receive, to_json(to_base(body, base_name(scope))))
            await self.app(scope, again, send)
            return
        adapter = await asyncio.to_thread(self._find, name)
        if path not in OFFERED:
            raise Refusal(
                f"{path} is not offered for adapters, such as {name!r}; use one of {', '.join(OFFERED)}",
                param="model",
                code="unsupported_with_adapter",
            )
        check_request(body, path)
        await self._answer(scope, receive, send, path, body, adapter)

    def _find(self, name: str) -> Served:
        """The adapter of this name.

        Raises:
            Refusal: 404: there is none; 400: it cannot be served.
        """
        try:
            return self.adapters.find(name)
        except AdapterError as error:
            if not self.adapters.holds(name):
                raise Refusal(
                    f"there is no adapter {name!r}", status=404, param="model", code="model_not_found"
                ) from error
            # A client is told what is wrong, and not where the server keeps its files.
            why = str(error).replace(f"{self.adapters.registry.directory}{os.sep}", "")
            raise Refusal(
                f"the adapter {name!r} cannot be served: {why}", param="model", code="adapter_not_servable"
            ) from error

    def _is_adapter(self, scope: Scope, name: object) -> bool:
        """Whether a model's name is that of an adapter, and not of a model of vLLM's own, which goes first."""
        return self.adapters.holds(name) and name not in model_names(scope)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, path: str, name: object) -> None:
        """Lets vLLM answer; where it does not know the model, says which there are."""
        if path not in OFFERED or not isinstance(name, str):
            await self.app(scope, receive, send)
            return
        held: list[asgi.Message] = []

        async def watch(message: asgi.Message) -> None:
            if held or (message["type"] == "http.response.start" and message["status"] == 404):
                held.append(message)
            else:
                await send(message)

        await self.app(scope, receive, watch)
        if held:
            _, cards = await self._list(scope)
            if cards is not None and name not in [card.get("id") for card in cards]:
                raise unknown_model(name, cards)
            for message in held:
                await send(message)

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, path: str, body: dict[str, Any], adapter: Served
    ) -> None:
        base = base_name(scope)
        prompts = None
        if holds_images(body, path):
            if self.adapters.no_images is not None:
                raise Refusal(f"images: {self.adapters.no_images}; send text alone", code="unsupported_with_adapter")
            teach_renderer(scope)
        else:
            rendered = await asgi.ask(self.app, scope, "POST", f"{path}/render", to_json(render_request(body, base)))
            if rendered.status != 200:
                _check_rendered(rendered)
                await _as_of(path, rendered).send(send)
                return
            prompts = rendered_ids(json.loads(rendered.body))
        placeholder = PLACEHOLDER if self._placeholder is None else self._placeholder
        is_last = False
        while True:
            request = with_adapter(body, path, adapter, prompts, placeholder, base)
            inner, again = asgi.with_body(scope, receive, to_json(request))
            answered = Answered(adapter, 1 if prompts is None else len(prompts), streamed=bool(body.get("stream")))
            answers = AdapterSend(send, answered, self._explain, path, hold_failure=not is_last)
            try:
                behind = adapter.num_virtual_tokens if prompts is None else 0
                with rendered_behind(request["cache_salt"], behind, placeholder):
                    await self.app(inner, again, answers)
            except Exception:  # vLLM 0.32 breaks off a stream of Responses whose request fails
                if not await answers.break_off():
                    raise
                logger.exception("prefixcore: a stream for the adapter %r has failed", adapter.name)
                return
            if not answers.is_held:
                return
            # Whoever replaces the adapter between our look and the connector's makes it fail: once more, with the new.
            now = await asyncio.to_thread(self._find, adapter.name)
            if now.digest == adapter.digest:
                await answers.release()
                return
            adapter, is_last = now, True

    def _explain(self, adapter: Served) -> str:
        """Why vLLM has failed a request for an adapter, as far as can be seen from here."""
        try:
            now = self._find(adapter.name)
        except Refusal as refusal:
            return refusal.message
        if now.digest != adapter.digest:
            return f"the adapter {adapter.name!r} was replaced while the request was answered; send it again"
        return (
            f"vLLM could not answer with the adapter {adapter.name!r} (digest {adapter.digest[:12]}...); the server's "
            "log says why"
        )

    async def _refuse(self, scope: Scope, send: Send, refusal: Refusal) -> None:
        """Sends an error of ours, but to a client that vLLM does not let in what it says."""
        door = await asgi.ask(self.app, scope, "GET", MODELS)
        if door.status in (401, 403):
            await door.send(send)
            return
        await asgi.json_answer(to_json(error_body(refusal, _path(scope))), refusal.status).send(send)


def _path(scope: Scope) -> str:
    """The path within the application, which may lie below a root path."""
    path, root = scope["path"], scope.get("root_path") or ""
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _is_internal(path: str) -> bool:
    return path.startswith("/inference/") or path.rstrip("/").endswith(("/render", "/derender"))


def _as_of(path: str, answer: Answer) -> Answer:
    """An error of vLLM's render endpoints, which is OpenAI's, as the interface at `path` words it."""
    if path != MESSAGES:
        return answer
    try:
        message = error_message(json.loads(answer.body))
    except ValueError:
        return answer
    refusal = Refusal(message or answer.body.decode(errors="replace"), status=answer.status)
    return asgi.json_answer(to_json(error_body(refusal, path)), answer.status)


def _check_rendered(answer: Answer) -> None:
    """Raises Refusal if vLLM does not say which tokens a prompt has, to anybody."""
    if answer.status in (403, 404, 405) and b"scale-out" in answer.body or answer.status in (404, 405):
        raise Refusal(
            "this server cannot place virtual tokens: start vLLM 0.32 or newer with --enable-scale-out, as prefixcore "
            "serve does",
            status=500,
            code="render",
        )
