"""The steps of PEFT's `generate` with a soft prompt."""

from __future__ import annotations

from typing import Any

from ..positions.cache import cache_argument, cache_length
from .methods import active_config


def without_another_prompt(peft_model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a step as PEFT prepares them, without a prompt behind a filled cache, which holds it already.

    PEFT 0.21 knows the cache by its name before transformers 5.24. Under the new one it finds none, takes each step for
    the first, and puts the whole prompt before each token that is written.
    """
    cache, embeds = cache_argument(inputs), inputs.get("inputs_embeds")
    if embeds is None or cache is None or not cache_length(cache):
        return inputs
    return {**inputs, "inputs_embeds": embeds[:, active_config(peft_model).num_virtual_tokens :]}
