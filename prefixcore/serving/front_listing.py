"""`/v1/models`, with the adapters in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .asgi import Scope
from .catalog import Served
from .openai_errors import Refusal

_MOST_NAMED = 50


def listing(models: Any, adapters: Iterable[Served]) -> list[dict[str, Any]]:
    """The cards of vLLM's own models, then one for each adapter that none of those has the name of.

    Args:
        models: what vLLM answers.
        adapters: what is served besides.

    Examples:
        >>> from prefixcore.serving.catalog import Served
        >>> from prefixcore.serving.front_listing import listing
        >>> base = {"data": [{"id": "base", "max_model_len": 2048}]}
        >>> [card["id"] for card in listing(base, [Served("capitals", "0" * 64, 20)])]
        ['base', 'capitals']
    """
    cards = [card for card in models.get("data", []) if isinstance(card, dict)]
    names = {card.get("id") for card in cards}
    base = cards[0] if cards else {}
    length = base.get("max_model_len")
    for adapter in adapters:
        if adapter.name not in names:
            cards.append(
                {
                    "id": adapter.name,
                    "object": "model",
                    "created": adapter.created,
                    "owned_by": "prefixcore",
                    "root": base.get("root", base.get("id")),
                    "parent": base.get("id"),
                    "max_model_len": length - adapter.num_virtual_tokens if isinstance(length, int) else None,
                    "digest": adapter.digest,
                    "baked_from": adapter.baked_from,
                    "num_virtual_tokens": adapter.num_virtual_tokens,
                    "task": adapter.task,
                }
            )
    return cards


def unknown_model(name: str, cards: Sequence[dict[str, Any]]) -> Refusal:
    """The answer to a request for a model that there is not."""
    names = [str(card.get("id")) for card in cards]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return Refusal(
        f"The model {name!r} does not exist. There are: {', '.join(names[:_MOST_NAMED])}{more}.",
        status=404,
        param="model",
        code="model_not_found",
    )


def base_name(scope: Scope) -> str | None:
    """The base model's name in vLLM's own application; None in another one."""
    models = getattr(getattr(scope.get("app"), "state", None), "openai_serving_models", None)
    paths = getattr(models, "base_model_paths", None)
    return paths[0].name if paths else None


def model_names(scope: Scope) -> set[str]:
    """The names of vLLM's own models: the base model's, and those of LoRA adapters; none of another application."""
    models = getattr(getattr(scope.get("app"), "state", None), "openai_serving_models", None)
    names = {path.name for path in getattr(models, "base_model_paths", None) or ()}
    return names | set(getattr(models, "lora_requests", None) or ())
