"""PEFT's two files, read as our configuration and values; `peft_writing` writes ours as theirs.

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
    CPTConfig,
    LayerShape,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    split_layers,
)
from ..nn.config import HEADS
from .errors import AdapterError, shown
from .tensors import TensorFile
from .weights import is_named

PROMPT_EMBEDDINGS = "prompt_embeddings"
HEAD = "base_model."
"""What PEFT puts before the name of a tensor of `modules_to_save`."""

PREFIX_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
MULTITASK, CPT = "MULTITASK_PROMPT_TUNING", "CPT"
PEFT_TYPES = (*PREFIX_TYPES, "PROMPT_TUNING", "P_TUNING", MULTITASK, CPT)

COLS, ROWS = "prefix_task_cols", "prefix_task_rows"
"""The factors of multitask prompt tuning, beside the shared prompt."""

CPT_KEYS = (
    "cpt_token_ids",
    "cpt_mask",
    "cpt_tokens_type_mask",
    "opt_weighted_loss_type",
    "opt_loss_decay_factor",
    "opt_projection_epsilon",
    "opt_projection_format_epsilon",
    "tokenizer_name_or_path",
)

Values = list[tuple[Tensor, Tensor]] | Tensor
"""What an adapter holds: one (key [Hkv, P, D], value [Hkv, P, Dv]) a layer, or a soft prompt [P, hidden]; of several
tasks, the one that they share."""


def peft_tensor_shape(peft_config: Mapping[str, Any]) -> list[int]:
    """The shape that `prompt_embeddings` must have.

    Raises:
        AdapterError: a method that is not read here, or a field that is missing or of a wrong type, named.
    """
    peft_type = peft_config.get("peft_type")
    if peft_type not in PEFT_TYPES:
        raise AdapterError(f"peft_type: expected one of {', '.join(PEFT_TYPES)}, got {shown(peft_type)}")
    if is_seq2seq(peft_config) and peft_type not in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"):
        raise AdapterError(f"peft_type: {peft_type} is not read for encoder-decoders")
    if peft_config.get("num_transformer_submodules") not in (None, 1, 2):
        raise AdapterError(
            "num_transformer_submodules: expected 1 (a decoder or an encoder alone) or 2 (an encoder-decoder), got "
            f"{shown(peft_config['num_transformer_submodules'])}"
        )
    width = _positive(peft_config, "token_dim")
    if peft_type in PREFIX_TYPES:
        if width % _positive(peft_config, "num_attention_heads"):
            raise AdapterError(
                f"token_dim: {width} is no multiple of num_attention_heads={peft_config['num_attention_heads']}"
            )
        width *= 2 * _positive(peft_config, "num_layers")
    elif is_seq2seq(peft_config):
        return [2 * _positive(peft_config, "num_virtual_tokens"), width]
    return [_positive(peft_config, "num_virtual_tokens"), width]


def is_seq2seq(peft_config: Mapping[str, Any]) -> bool:
    """Whether PEFT wrote the file for the two stacks of an encoder-decoder."""
    return peft_config.get("num_transformer_submodules") == 2


def seen_by_seq2seq(values: Values, num_virtual_tokens: int) -> Values:
    """What an encoder-decoder sees in PEFT of what the file of an adapter holds.

    Of a soft prompt's 2P rows PEFT puts the first P before the encoder's input. Of a prefix, it cuts the layers into
    groups of two pairs of keys and values, for self- and cross-attention, and empties the cache of the second: layer i
    of the decoder has the pair 2i, counted around (`pair_in_seq2seq`; `PeftModel.get_prompt`).
    """
    if isinstance(values, Tensor):
        return values[:num_virtual_tokens]
    pairs = [values[pair_in_seq2seq(layer, len(values))] for layer in range(len(values))]
    return [(key.clone(), value.clone()) for key, value in pairs]


def pair_in_seq2seq(layer: int, num_pairs: int) -> int:
    """Which pair of keys and values of PEFT's prefix a layer of the decoder sees in its self-attention."""
    return 2 * layer % num_pairs


def task_shapes(peft_config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The shapes of the tensors that stand beside `prompt_embeddings`: those of multitask prompt tuning's tasks.

    Args:
        peft_config: one that `peft_tensor_shape` has accepted.

    Raises:
        AdapterError: a field that is missing or of a wrong type, named.
    """
    if peft_config["peft_type"] != MULTITASK:
        return {}
    tasks, rank = _positive(peft_config, "num_tasks"), _positive(peft_config, "num_ranks")
    return {
        COLS: [tasks, peft_config["num_virtual_tokens"], rank],
        ROWS: [tasks, rank, peft_config["token_dim"]],
    }


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
        "modules_to_save": peft_config.get("modules_to_save"),
    }
    try:
        if peft_config["peft_type"] == MULTITASK:
            tasks = {name: peft_config[name] for name in ("num_tasks", "num_ranks")}
            return MultitaskPromptTuningConfig(**common, **tasks), []
        if peft_config["peft_type"] == CPT:
            return CPTConfig(**common, **{name: peft_config[name] for name in CPT_KEYS if name in peft_config}), []
        if peft_config["peft_type"] not in PREFIX_TYPES:
            tokenizer = peft_config.get("tokenizer_name_or_path")
            return PromptTuningConfig(**common, tokenizer_name_or_path=tokenizer), []
        frozen = peft_config.get("num_frozen_tokens", 1) if peft_config["peft_type"] == "CARTRIDGE" else 0
        where = ("decoder",) if is_seq2seq(peft_config) else None
        config = PrefixTuningConfig(**common, num_frozen_tokens=frozen, where=where)
    except (TypeError, ValueError) as error:
        raise AdapterError(str(error)) from error
    heads = peft_config["num_attention_heads"]
    dim = peft_config["token_dim"] // heads
    return config, [LayerShape(heads, dim, dim)] * peft_config["num_layers"]


def head_shapes(file: TensorFile, config: Config) -> dict[str, list[int]]:
    """The shapes of the tensors that modules of `modules_to_save` have in a file, by their names in the model.

    Raises:
        AdapterError: the file has none of a module that is named and does not merely go with the task type.
    """
    found = {
        name.removeprefix(HEAD): shape
        for name, shape in file.shapes.items()
        if name.startswith(HEAD) and any(is_named(name.removeprefix(HEAD), each) for each in config.head_names)
    }
    for wanted in config.modules_to_save or ():
        if wanted not in HEADS.get(config.task_type or "", ()) and not any(is_named(name, wanted) for name in found):
            raise AdapterError(
                f"{file.path}: modules_to_save: {shown(wanted)} is named, but the file has no tensor of it"
            )
    return found


def read_peft(
    file: TensorFile, shapes: Sequence[LayerShape], heads: Mapping[str, list[int]]
) -> tuple[Values, dict[str, Tensor], dict[str, Tensor]]:
    """What is in a file of PEFT's layout, whose header has been checked: the values, the heads, the factors of tasks.

    A prefix goes from the file into its layers some virtual tokens at a time, so that it is never in memory twice.

    Raises:
        AdapterError: a number is not finite, or the file is damaged.
    """
    if not shapes:
        tensors = file.read()
        modules = {name: tensors[HEAD + name] for name in heads}
        tasks = {name: tensors[name] for name in (COLS, ROWS) if name in tensors}
        return tensors[PROMPT_EMBEDDINGS], modules, tasks
    tokens, width = file.shapes[PROMPT_EMBEDDINGS]
    values = [
        (torch.empty(s.num_kv_heads, tokens, s.key_dim), torch.empty(s.num_kv_heads, tokens, s.value_dim))
        for s in shapes
    ]

    modules = {name: torch.empty(shape) for name, shape in heads.items()}

    def place(name: str, start: int, numbers: Tensor) -> None:
        if name != PROMPT_EMBEDDINGS:
            modules[name.removeprefix(HEAD)].view(-1)[start : start + len(numbers)] = numbers
            return
        first = start // width
        piece = split_layers(numbers.view(-1, width), shapes)
        for (key, value), (some_keys, some_values) in zip(values, piece, strict=True):
            key[:, first : first + some_keys.shape[1]] = some_keys
            value[:, first : first + some_values.shape[1]] = some_values

    file.read_pieces(place, multiple=width)
    return values, modules, {}


def _positive(peft_config: Mapping[str, Any], field: str) -> int:
    value = peft_config.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**63:
        raise AdapterError(f"{field}: expected an integer of at least 1, got {shown(value)}")
    return value
