"""`--train-layers`: refused while nothing has been computed, where a layer has no prefix to train."""

from __future__ import annotations

import argparse
from typing import Any

from .failures import UserError, user_errors


def check_train_layers(arguments: argparse.Namespace, config: Any, model: Any) -> None:
    """Raises UserError if a layer of `--train-layers` has no prefix, or the method none that is trained by layers.

    Args:
        arguments: of the command.
        config: of what is to be attached; None: `--resume` names the adapter.
        model: the opened model.
    """
    if arguments.train_layers is None:
        return
    if config is not None and config.method != "prefix":
        raise UserError(f"--train-layers is for --method prefix, got {config.method}; leave it out")
    if config is not None and config.reparameterization != "none":
        raise UserError(
            f"--train-layers: {config.reparameterization!r} is trained in place of the prefix and makes the values of "
            "all its layers: leave one of the two out, or say which layers have a prefix (--layers)"
        )
    own = layers_of(arguments, config, model)
    missing = sorted(set(arguments.train_layers) - set(own))
    if own and missing:
        raise UserError(
            f"--train-layers: layer {missing[0]} is not among the layers with a prefix, {own[0]} to {own[-1]}; name "
            "some of these"
        )


def layers_of(arguments: argparse.Namespace, config: Any, model: Any) -> list[int]:
    """The layers with a prefix; none: a soft prompt that is gone on with, which `train_layers` refuses."""
    from ..adapters import AdapterError, read_adapter
    from ..hf.reaching import find_attention_layers

    with user_errors(AdapterError, ValueError, NotImplementedError):
        if config is None:
            return list(read_adapter(arguments.resume).layers)
        return list(config.layers or range(len(find_attention_layers(model)[0])))
