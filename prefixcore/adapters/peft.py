"""PEFT's two files: reading them as our configuration and values, and writing ours as theirs.

`adapter_model.safetensors` holds one tensor, `prompt_embeddings`: `[P, L*2*Hkv*D]` for a prefix (for each virtual token
layer after layer, in each the key and then the value, head after head), `[P, E]` for a soft prompt. PEFT does not keep
what trained it (an MLP, an LSTM). As of PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..nn import (
    Config,
    LayerShape,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    join_layers,
    split_layers,
)
from .errors import AdapterError, shown
from .tensors import TensorFile

PROMPT_EMBEDDINGS = "prompt_embeddings"
PREFIX_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
PEFT_TYPES = (*PREFIX_TYPES, "PROMPT_TUNING", "P_TUNING")

Values = list[tuple[Tensor, Tensor]] | Tensor
"""What an adapter holds: one (key [Hkv, P, D], value [Hkv, P, Dv]) a layer, or a soft prompt [P, hidden]."""


def is_expressible(config: Config, shapes: Sequence[LayerShape], base_model: Mapping[str, Any]) -> bool:
    """Whether PEFT's files can hold it: a prefix must be in every layer, with one shape and D = Dv."""
    if not isinstance(config, PrefixTuningConfig):
        return True
    every = config.layers is None and base_model.get("num_hidden_layers") in (None, len(shapes))
    return every and len(set(shapes)) == 1 and shapes[0].key_dim == shapes[0].value_dim


def to_peft(config: Config, values: Values, base_model: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """PEFT's configuration (what `adapter_config.json` holds) and the tensor `prompt_embeddings`, fp32.

    Args:
        config: what was trained.
        values: the baked virtual tokens; `is_expressible` holds for them.
        base_model: its fingerprint.
    """
    common = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model.get("name_or_path"),
        "inference_mode": True,
        "modules_to_save": None,
        "num_transformer_submodules": 1,
        "revision": None,
        "task_type": config.task_type,
    }
    if isinstance(values, Tensor):
        shape = {
            "num_layers": base_model.get("num_hidden_layers"),
            "num_attention_heads": base_model.get("num_attention_heads"),
            "token_dim": values.shape[1],
        }
        return {**common, **shape, **_prompt_keys(config), "num_virtual_tokens": values.shape[0]}, values
    heads, tokens, dim = values[0][0].shape
    shape = {"num_layers": len(values), "num_attention_heads": heads, "token_dim": heads * dim}
    assert isinstance(config, PrefixTuningConfig)
    keys: dict[str, Any]
    if config.num_frozen_tokens:
        keys = {"peft_type": "CARTRIDGE", "num_frozen_tokens": config.num_frozen_tokens}
    else:
        keys = {
            "peft_type": "PREFIX_TUNING",
            "prefix_projection": config.prefix_projection,
            "encoder_hidden_size": config.encoder_hidden_size,
            "init_weights": "zero" if config.init == "zero" else None,
        }
    return {**common, **shape, **keys, "num_virtual_tokens": tokens}, join_layers(values)


def _prompt_keys(config: Config) -> dict[str, Any]:
    if isinstance(config, PTuningConfig):
        return {
            "peft_type": "P_TUNING",
            "encoder_reparameterization_type": config.encoder_reparameterization_type,
            "encoder_hidden_size": config.encoder_hidden_size,
            "encoder_num_layers": config.encoder_num_layers,
            "encoder_dropout": config.encoder_dropout,
        }
    # PEFT refuses TEXT without the name of a tokenizer; the word changes nothing in a trained adapter.
    text = config.init == "text" and config.tokenizer_name_or_path is not None
    return {
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "TEXT" if text else "SAMPLE_VOCAB" if config.init == "vocab" else "RANDOM",
        "prompt_tuning_init_text": config.init_text if text else None,
        "tokenizer_name_or_path": config.tokenizer_name_or_path if text else None,
        "tokenizer_kwargs": None,
    }


def peft_tensor_shape(peft_config: Mapping[str, Any]) -> list[int]:
    """The shape that `prompt_embeddings` must have.

    Raises:
        AdapterError: a method that is not read here, or a field that is missing or of a wrong type, named.
    """
    peft_type = peft_config.get("peft_type")
    if peft_type not in PEFT_TYPES:
        raise AdapterError(f"peft_type: expected one of {', '.join(PEFT_TYPES)}, got {shown(peft_type)}")
    if peft_config.get("num_transformer_submodules") not in (None, 1):
        raise AdapterError(
            "num_transformer_submodules: expected 1 (a decoder or an encoder alone), got "
            f"{shown(peft_config['num_transformer_submodules'])}"
        )
    if peft_config.get("modules_to_save"):
        raise AdapterError(
            f"modules_to_save: whole modules saved beside the virtual tokens ({shown(peft_config['modules_to_save'])}) "
            "are not read here"
        )
    width = _positive(peft_config, "token_dim")
    if peft_type in PREFIX_TYPES:
        if width % _positive(peft_config, "num_attention_heads"):
            raise AdapterError(
                f"token_dim: {width} is no multiple of num_attention_heads={peft_config['num_attention_heads']}"
            )
        width *= 2 * _positive(peft_config, "num_layers")
    return [_positive(peft_config, "num_virtual_tokens"), width]


def from_peft(peft_config: Mapping[str, Any]) -> tuple[Config, list[LayerShape]]:
    """The configuration of a PEFT adapter and the shape of each of its layers; none for a soft prompt.

    The MLP or LSTM that trained it is not in PEFT's files, so the configuration is that of a plain prefix or soft
    prompt with `init="tensor"`: training goes on from its values.

    Args:
        peft_config: one that `peft_tensor_shape` has accepted.

    Raises:
        AdapterError: naming a field whose value is out of range.
    """
    common: dict[str, Any] = {
        "num_virtual_tokens": peft_config["num_virtual_tokens"],
        "init": "tensor",
        "task_type": peft_config.get("task_type"),
    }
    try:
        if peft_config["peft_type"] not in PREFIX_TYPES:
            tokenizer = peft_config.get("tokenizer_name_or_path")
            return PromptTuningConfig(**common, tokenizer_name_or_path=tokenizer), []
        frozen = peft_config.get("num_frozen_tokens", 1) if peft_config["peft_type"] == "CARTRIDGE" else 0
        config = PrefixTuningConfig(**common, num_frozen_tokens=frozen)
    except ValueError as error:
        raise AdapterError(str(error)) from error
    heads = peft_config["num_attention_heads"]
    dim = peft_config["token_dim"] // heads
    return config, [LayerShape(heads, dim, dim)] * peft_config["num_layers"]


def read_peft(file: TensorFile, shapes: Sequence[LayerShape]) -> Values:
    """The values in a file of PEFT's layout, whose header `peft_tensor_shape` has been checked against.

    A prefix goes from the file into its layers some virtual tokens at a time, so that it is never in memory twice.

    Raises:
        AdapterError: a number is not finite, or the file is damaged.
    """
    if not shapes:
        return file.read()[PROMPT_EMBEDDINGS]
    tokens, width = file.shapes[PROMPT_EMBEDDINGS]
    values = [
        (torch.empty(s.num_kv_heads, tokens, s.key_dim), torch.empty(s.num_kv_heads, tokens, s.value_dim))
        for s in shapes
    ]

    def place(name: str, start: int, numbers: Tensor) -> None:
        first = start // width
        piece = split_layers(numbers.view(-1, width), shapes)
        for (key, value), (some_keys, some_values) in zip(values, piece, strict=True):
            key[:, first : first + some_keys.shape[1]] = some_keys
            value[:, first : first + some_values.shape[1]] = some_values

    file.read_pieces(place, multiple=width)
    return values


def _positive(peft_config: Mapping[str, Any], field: str) -> int:
    value = peft_config.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**63:
        raise AdapterError(f"{field}: expected an integer of at least 1, got {shown(value)}")
    return value
