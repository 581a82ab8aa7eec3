"""What virtual tokens start from where nobody says: some of the examples to train on."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .output import say

if TYPE_CHECKING:
    from ..training import Example


def started(arguments: argparse.Namespace, config: Any, training: Sequence[Example], tokenizer: Any) -> Any:
    """The configuration with a text of training examples to start from, unless a start was given.

    Raises:
        DataError: an example that the tokenizer cannot encode.
    """
    from ..training import starting_text

    if config is None or arguments.init is not None or arguments.init_text is not None:
        return config
    tokens = arguments.num_virtual_tokens
    text = starting_text(training, tokenizer, tokens, end=arguments.end, seed=arguments.seed)
    if not text:
        return config
    say("starting from some of the examples to train on; the adapter holds them as init_text (--init vocab: none)")
    return dataclasses.replace(config, init="text", init_text=text, num_virtual_tokens=tokens)
