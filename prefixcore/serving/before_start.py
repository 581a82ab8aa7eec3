"""What is looked at before a server is started: the model's configuration, its tokenizer, and every adapter."""

from __future__ import annotations

from typing import Any

from ..nn import LayerShape
from .checkpoint import local_folder
from .salt import PLACEHOLDER
from .served_model import ServedModel


def describe_model(name: str) -> ServedModel:
    """What is known of a model without its weights in memory; those on the disk are compared where they can be found.

    Args:
        name: a folder of a transformers model, or its id.

    Raises:
        OSError, ValueError: transformers finds no such model.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = LayerShape(heads, size, size)
    return ServedModel.describe(config, [shape] * config.num_hidden_layers, local_folder(name))


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
