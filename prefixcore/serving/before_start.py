"""What is looked at before a server is started: the model's configuration, its tokenizer, and every adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .checkpoint import local_folder
from .context_length import OPTION, context_length
from .families import why_unverified
from .model_config import WITHOUT_WINDOWS, layer_shapes, lossy_window, read_config, window
from .salt import PLACEHOLDER
from .served_model import ServedModel


def describe_model(name: str) -> ServedModel:
    """What is known of a model without its weights in memory; those on the disk are compared where they can be found.

    Args:
        name: a folder of a transformers model, or its id.

    Raises:
        OSError, ValueError: transformers finds no such model.
    """
    config = read_config(name)
    return ServedModel.describe(config, layer_shapes(config.get_text_config()), local_folder(name))


def why_not_served(name: str, arguments: Sequence[str], *, unverified_model: bool = False) -> str | None:
    """Why vLLM would refuse to serve prefixes on a model once it has loaded it, and what to give; None: it would not.

    Args:
        name: a folder of a transformers model, or its id.
        arguments: of vLLM's own.
        unverified_model: serve a family that was not compared with transformers.

    Raises:
        OSError, ValueError: transformers finds no such model.
        LaunchError: vLLM is told something that cannot be read.
    """
    config = read_config(name)
    shapes = set(layer_shapes(config.get_text_config()))
    if len(shapes) > 1:
        kinds = ", ".join(sorted(f"{shape.num_kv_heads} heads of {shape.key_dim}" for shape in shapes))
        return f"its layers have keys of several sizes ({kinds}); a prefix is served where all are of one size"
    why = why_unverified(config.model_type)
    if why and not unverified_model:
        return f"{why}; give --unverified-model, then run `prefixcore validate-serving`"
    size, everywhere = window(config.get_text_config())
    length = context_length(name, arguments)
    if size is None or (length is not None and length <= size):
        return None
    if everywhere:
        return f"all its layers attend to {lossy_window(size)}; give -- {WITHOUT_WINDOWS}"
    return f"some of its layers attend to {lossy_window(size)}; give -- {OPTION} {size}, or less"


def choose_placeholder(tokenizer: Any) -> int:
    """The token that stands for a virtual one: a token that no prompt begins with and no answer holds.

    What a repetition penalty does to the prompt's tokens then does nothing, for this one is never an answer's.

    Args:
        tokenizer: a transformers tokenizer.

    Examples:
        >>> from tests import tiny
        >>> from prefixcore.serving.before_start import choose_placeholder
        >>> choose_placeholder(tiny.tokenizer())
        1
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    unfit = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    special = [tokenizer.pad_token_id, tokenizer.unk_token_id, *sorted(tokenizer.all_special_ids)]
    for token in special:
        if token is not None and token not in unfit and tokenizer.convert_ids_to_tokens(token) not in template:
            return int(token)
    # A tokenizer's ids are in the order in which its pieces were found: the last ones are rare.
    for token in range(len(tokenizer) - 1, 0, -1):
        if token not in unfit and tokenizer.convert_ids_to_tokens(token) not in template:
            return token
    return PLACEHOLDER
