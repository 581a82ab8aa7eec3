"""How many tokens the server reads and writes for one request, and what the virtual ones leave of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from .errors import LaunchError
from .model_config import WITHOUT_WINDOWS, read_config, window
from .vllm_options import values_of

OPTION = "--max-model-len"
_MULTIPLIERS = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
_LENGTH = re.compile(r"(\d+(?:\.\d+)?)([kmgKMG]?)")
_LEAST_TEXT = 2
"""A token of a prompt, and one of an answer."""


def context_length(name: str, arguments: Sequence[str]) -> int | None:
    """The most tokens of a request with its answer: as vLLM is told, else as the model states; None: nobody says.

    Args:
        name: a folder of a transformers model, or its id.
        arguments: of vLLM's own.

    Raises:
        LaunchError: vLLM is told something that is no length.

    Examples:
        >>> from prefixcore.serving.context_length import context_length
        >>> context_length("my-model", ["--max-model-len", "4k"]), context_length("my-model", [])
        (4000, 128)
    """
    given = values_of(OPTION, arguments)
    length = None if given is None else _length(" ".join(given))
    length = _stated(name) if length is None else length
    if values_of(WITHOUT_WINDOWS, arguments) is None:
        return length
    size, _ = window(read_config(name).get_text_config())
    return min(filter(None, (length, size)), default=None)


def why_no_room(virtual_tokens: int, length: int | None) -> str | None:
    """Why no request fits behind so many virtual tokens; None: some do, or nobody knows."""
    if length is None or virtual_tokens + _LEAST_TEXT <= length:
        return None
    return (
        f"its {virtual_tokens:,} virtual tokens leave no room for a prompt and an answer in the {length:,} tokens of a "
        f"request; give more (-- {OPTION} N), where the model has them, or take fewer virtual tokens"
    )


def _length(text: str) -> int | None:
    """A length as vLLM reads it; None: it is vLLM that chooses."""
    if text in ("auto", "-1"):
        return None
    match = _LENGTH.fullmatch(text)
    length = Decimal(match[1]) * _MULTIPLIERS.get(match[2], 1) if match else Decimal(0)
    if length < 1 or length != int(length):
        raise LaunchError(f"{OPTION}: expected a number of tokens, such as 4096 or 4k, or auto, got {text!r}")
    return int(length)


def _stated(name: str) -> int | None:
    """The positions that the model was made for; None: it says none, or some that its rotary embedding extends."""
    config = read_config(name).get_text_config()
    stated = getattr(config, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated < 1 or "factor" in (getattr(config, "rope_parameters", None) or {}):
        return None
    return stated
