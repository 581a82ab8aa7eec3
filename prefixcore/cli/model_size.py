"""Whether a model folder's weights can be what its `config.json` asks for, known before any is made room for.

A configuration is a few bytes that can ask for any work: a module for each of a billion layers, or memory for a table
that no file holds, because what is missing in the files is made at random.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .failures import UserError, user_errors

MOST_BLOCKS = 4096
"""Layers, or experts of a layer: more than any model has, and few enough to be built in seconds."""

MOST_BYTES = 2**22
"""Of a `config.json`: a thousand times what it needs."""

_COUNTS = re.compile(r"layers?$|blocks?$|depth$|experts$")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_MOST_NUMBERS_A_BYTE = {"plain": 1, "quantized": 8}
"""Weights of a float have a byte at least; those of a quantized model a bit."""


def check_size(name: str) -> None:
    """Raises UserError if the configuration asks for too many layers, more than the files hold, or an encoder-decoder.

    Args:
        name: `--model`. Of an id, whose files are not there yet, only the configuration is looked at.
    """
    from transformers import AutoConfig, PretrainedConfig

    folder = Path(name)
    if folder.is_dir() and (size := (folder / "config.json").stat().st_size) > MOST_BYTES:
        raise UserError(f"--model {name} cannot be opened: its config.json has {size:,} bytes")
    # Read as it stands first: the class of a configuration may make a list with an entry for each layer.
    with user_errors(Exception, what=f"--model {name} cannot be opened"):
        fields, _ = PretrainedConfig.get_config_dict(name)
        for field, count in _counts(fields):
            if count > MOST_BLOCKS:
                raise UserError(
                    f"--model {name} cannot be opened: its config.json has {field} {_shown(count)}, of at most "
                    f"{MOST_BLOCKS:,}"
                )
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        layers = getattr(config.get_text_config(), "num_hidden_layers", None)
        if isinstance(layers, int) and layers < 1:
            raise UserError(f"--model {name} cannot be opened: its config.json has {layers} layers")
    if config.is_encoder_decoder:
        raise UserError(
            f"--model {name} is an encoder-decoder ({config.model_type}), and the commands are for causal language "
            "models: attach, train and save in Python (docs/guides/transformers.md, Encoder-decoders)"
        )
    if folder.is_dir():
        _check_files(name, folder, config)


def _check_files(name: str, folder: Path, config: Any) -> None:
    import torch

    from ..hf.model.auto_class import auto_class

    held = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in _WEIGHTS and path.is_file())
    if not held:  # transformers says what it misses
        return
    kind = "quantized" if getattr(config, "quantization_config", None) else "plain"
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=False)
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise UserError(f"--model {name} cannot be opened: {str(error).partition(chr(10))[0]}") from error
        asked = "more numbers than can be counted"
    except Exception as error:  # of any kind, as when the model is opened
        raise UserError(f"--model {name} cannot be opened: {error}") from error
    else:
        weights = sum(parameter.numel() for parameter in model.parameters())
        if weights <= held * _MOST_NUMBERS_A_BYTE[kind]:
            return
        asked = f"{weights:,} numbers"
    raise UserError(
        f"--model {name} is not whole: its config.json asks for weights of {asked}, and its files of weights have "
        f"{held:,} bytes"
    )


def _counts(fields: Any, depth: int = 0) -> Iterator[tuple[str, float]]:
    """The fields of a configuration, and of those within it, that say how many modules of a kind there are."""
    if not isinstance(fields, dict) or depth > 8:
        return
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _counts(value, depth + 1)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and _COUNTS.search(str(name)):
            yield str(name), value


def _shown(count: float) -> str:
    if isinstance(count, float):
        return f"{count:g}"
    return f"{count:,}" if abs(count) < 10**18 else "of more digits than are shown"
