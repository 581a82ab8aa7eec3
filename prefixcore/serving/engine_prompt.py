"""A prompt as vLLM's engine is given it, with placeholders before its tokens.

Where each of its images stands is counted in tokens, so it moves with them: which embeddings are replaced, which tokens
see each other both ways, where positions of three axes turn into those of an image, and which images are hashed with
which cache block all go by that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

IMAGES = "image"
"""vLLM's word for the one kind of media whose answers were compared with transformers'."""


def behind_placeholders(prompt: Mapping[str, Any], count: int, placeholder: int) -> dict[str, Any]:
    """A rendered prompt behind `count` placeholders.

    Args:
        prompt: vLLM's `TokensInput` or `MultiModalInput`.
        count: P.
        placeholder: the token id that stands for a virtual token.

    Raises:
        ValueError: it holds audio, video or embeddings.

    Examples:
        >>> from prefixcore.serving.engine_prompt import behind_placeholders
        >>> behind_placeholders({"type": "token", "prompt_token_ids": [7, 8]}, 2, 0)["prompt_token_ids"]
        [0, 0, 7, 8]
    """
    ids, media = prompt.get("prompt_token_ids"), prompt.get("mm_placeholders") or {}
    if ids is None or prompt.get("type", "token") not in ("token", "multimodal") or set(media) - {IMAGES}:
        raise ValueError(
            "audio, video and embeddings cannot be read together with an adapter; give text, with images or without"
        )
    moved = {**prompt, "prompt_token_ids": [placeholder] * count + list(ids)}
    if media:
        moved["mm_placeholders"] = {IMAGES: [replace(each, offset=each.offset + count) for each in media[IMAGES]]}
    return moved
