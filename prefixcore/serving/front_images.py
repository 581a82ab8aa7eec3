"""Requests with images: their prompts are put behind placeholders where vLLM has made them.

vLLM 0.32 takes the token ids of a prompt in place of a text, but not in place of messages with images, which it always
reads itself. So its renderer, of which a server has one, hands on what it makes of these requests with the placeholders
before it, as `PrefixLLM` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any
from weakref import WeakSet

from .asgi import Scope
from .engine_prompt import behind_placeholders
from .openai_errors import Refusal

_RENDER = "process_for_engine_async"
"""The last step of vLLM's renderer: a tokenized prompt and its images become what the engine is given."""

_behind: ContextVar[tuple[str, int, int] | None] = ContextVar("prefixcore_behind", default=None)
"""The salt of the running request, how many placeholders its prompt is put behind, and which; None: it stays as it is.

A web server may start a request that was sent ahead in the context of the one before it, whose salt it has not.
"""

_taught: WeakSet[Any] = WeakSet()
"""Renderers that heed `_behind`."""


@contextmanager
def rendered_behind(salt: str, count: int, placeholder: int) -> Iterator[None]:
    """A block in which prompts with `salt` are rendered behind `count` placeholders, also in tasks that start there."""
    token = _behind.set((salt, count, placeholder) if count else None)
    try:
        yield
    finally:
        _behind.reset(token)


def teach_renderer(scope: Scope) -> None:
    """Lets the renderer of the server that a request has come to heed `rendered_behind`.

    Raises:
        Refusal: it renders in another way than vLLM 0.32's.
    """
    engine = getattr(getattr(scope.get("app"), "state", None), "engine_client", None)
    renderer = getattr(engine, "renderer", None)
    render = getattr(renderer, _RENDER, None)
    if render is None:
        raise Refusal(
            "this server cannot place virtual tokens before images; this front is made for vLLM 0.32",
            status=500,
            code="render",
        )
    if renderer not in _taught:
        setattr(renderer, _RENDER, partial(_render, render))
        _taught.add(renderer)


async def _render(render: Any, *args: Any, **kwargs: Any) -> Any:
    prompt = await render(*args, **kwargs)
    salt, *placeholders = _behind.get() or (None,)
    if salt is None or prompt.get("cache_salt") != salt:
        return prompt
    return behind_placeholders(prompt, *placeholders)
