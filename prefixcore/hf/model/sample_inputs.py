"""What models read, and the input of a forward that only finds something out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .devices import device_of
from .signature import argument_names

INPUTS = (
    "input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "decoder_input_ids",
    "decoder_inputs_embeds",
)  # fmt: skip
"""The arguments that models read text, embeddings, images and sound from, each with a row of the batch first."""

CACHES = ("cache", "past_key_values", "cache_params")
"""What the cache is called: `past_key_values` up to transformers 5.23, `cache` since; `cache_params` in Mamba."""

_CHOICES = "ForMultipleChoice"
"""How the names of classes end that read several texts a row, [rows, choices, T]."""

_IMAGE = 224
"""Height and width of an image for a model that takes any."""

_SAMPLES = 1600
"""Numbers of a wave: some frames of wav2vec 2.0 and its kind, whose convolutions take 400 for the first."""


def model_input(kwargs: Mapping[str, Any]) -> Any:
    """What a call reads; None: nothing that is known."""
    return next((kwargs[name] for name in INPUTS if kwargs.get(name) is not None), None)


def reads_tokens(model: PreTrainedModel) -> bool:
    """Whether the model reads token ids; else images or sound."""
    return bool(model.main_input_name == "input_ids")


def sample_inputs(
    model: PreTrainedModel, ids: Tensor, rows: int = 1, decoder_ids: Tensor | None = None
) -> dict[str, Any]:
    """The arguments of a forward: `ids` [rows, T] for a model that reads tokens, noise for one that does not.

    The decoder of an encoder-decoder reads `decoder_ids`; None: `ids` too. A head for multiple choice gets each row as
    the only choice, [rows, 1, T].

    Raises:
        NotImplementedError: it is not known how large what the model reads has to be.
    """
    decoder = {}
    if model.config.is_encoder_decoder and "decoder_input_ids" in argument_names(model):
        decoder = {"decoder_input_ids": ids if decoder_ids is None else decoder_ids, "use_cache": False}
    if reads_tokens(model):
        ids = ids[:, None] if type(model).__name__.endswith(_CHOICES) else ids
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False, **decoder}
    return {model.main_input_name: _noise(model, rows).to(device_of(model), model.dtype), **decoder}


def _noise(model: PreTrainedModel, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    config, name = model.config, model.main_input_name
    if name == "pixel_values":
        config = getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config
        size = getattr(config, "image_size", None) or _IMAGE
        height, width = (size, size) if isinstance(size, int) else size
        return torch.randn(rows, getattr(config, "num_channels", 3), height, width, generator=generator)
    if name == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * config.max_source_positions
        return torch.randn(rows, config.num_mel_bins, frames, generator=generator)
    if name == "input_values" and hasattr(config, "conv_kernel"):
        return torch.randn(rows, _SAMPLES, generator=generator)
    raise NotImplementedError(
        f"{type(model).__name__} reads {name}, whose size its configuration does not say, so its layers cannot be found"
    )
