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
    CPTConfig,
    LayerShape,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    join_layers,
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

_CPT_KEYS = (
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


def is_expressible(config: Config, shapes: Sequence[LayerShape], base_model: Mapping[str, Any]) -> bool:
    """Whether PEFT's files can hold it: a prefix must be in every layer, with one shape and D = Dv.

    PEFT puts every soft prompt before the text, so one that stands in the text (`virtual_token_ids`) would be loaded
    without a word and be wrong; so would a prefix that leaves the text where it is (`position_offset=False`).
    """
    if not isinstance(config, PrefixTuningConfig):
        return getattr(config, "virtual_token_ids", None) is None
    if config.where is not None:
        return _is_of_decoder(config, shapes, base_model)
    every = config.layers is None and base_model.get("num_hidden_layers") in (None, len(shapes))
    return every and config.position_offset and len(set(shapes)) == 1 and shapes[0].key_dim == shapes[0].value_dim


def _is_of_decoder(config: PrefixTuningConfig, shapes: Sequence[LayerShape], base_model: Mapping[str, Any]) -> bool:
    """Whether it is what PEFT can give an encoder-decoder: a prefix in the self-attention of its whole decoder."""
    if config.where != ("decoder",) or base_model.get("decoder_layers") != len(shapes) or config.num_frozen_tokens:
        return False
    generates = str(base_model.get("class")).endswith(("ForConditionalGeneration", "MTModel"))
    same = len(set(shapes)) == 1 and shapes[0].key_dim == shapes[0].value_dim
    return generates and same and config.position_offset


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
        "modules_to_save": config.head_names or None,
        "num_transformer_submodules": 1,
        "revision": None,
        "task_type": _task_type(config, str(base_model.get("class"))),
    }
    if isinstance(values, Tensor):
        shape = {
            "num_layers": base_model.get("num_hidden_layers"),
            "num_attention_heads": base_model.get("num_attention_heads"),
            "token_dim": values.shape[1],
        }
        return {**common, **shape, **_prompt_keys(config), "num_virtual_tokens": values.shape[0]}, values
    assert isinstance(config, PrefixTuningConfig)
    if config.where is not None:
        values = for_seq2seq(values)
        common |= {"num_transformer_submodules": 2, "task_type": "SEQ_2_SEQ_LM"}
    heads, tokens, dim = values[0][0].shape
    shape = {"num_layers": len(values), "num_attention_heads": heads, "token_dim": heads * dim}
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


_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}
"""What PEFT calls the task of a model that does not generate, by how the name of its class ends."""


def _task_type(config: Config, model_class: str) -> str | None:
    """The task type by which PEFT can load the adapter.

    PEFT wants a model of "CAUSAL_LM" to generate, and of a classification the head in the file. Where the head was not
    trained along, a model that does not generate is one for "FEATURE_EXTRACTION", which asks for nothing.
    """
    task = config.task_type
    if task == "CAUSAL_LM" and "Head" not in model_class:  # GPT2LMHeadModel, of which GPT2Model is the body
        task = next((name for end, name in _TASK_TYPES.items() if model_class.endswith(end)), task)
    if task in HEADS and not set(HEADS[task]) & set(config.head_names):
        return "FEATURE_EXTRACTION"
    return task


def _prompt_keys(config: Config) -> dict[str, Any]:
    if isinstance(config, CPTConfig):
        return {"peft_type": CPT, **{name: getattr(config, name) for name in _CPT_KEYS}}
    if isinstance(config, MultitaskPromptTuningConfig):
        return {
            "peft_type": MULTITASK,
            "num_tasks": config.num_tasks,
            "num_ranks": config.num_ranks,
            "prompt_tuning_init": "RANDOM",  # any other word would make PEFT look for a text or a source adapter
            "prompt_tuning_init_text": None,
            "prompt_tuning_init_state_dict_path": None,
            "prompt_tuning_init_task": config.prompt_tuning_init_task,
            "tokenizer_name_or_path": None,
            "tokenizer_kwargs": None,
        }
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
    of the decoder has the pair 2i, counted around (`PeftModel.get_prompt`).
    """
    if isinstance(values, Tensor):
        return values[:num_virtual_tokens]
    pairs = [values[2 * i % len(values)] for i in range(len(values))]
    return [(key.clone(), value.clone()) for key, value in pairs]


def for_seq2seq(values: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The inverse of `seen_by_seq2seq`: the pair of each layer, and an empty one for cross-attention, which PEFT drops.

    With as many pairs as the decoder has layers PEFT would come around to the first halfway, so the file says that
    there are twice as many; PEFT makes a cache of so many layers, of which the decoder reads those that it has.
    """
    return [pair for key, value in values for pair in ((key, value), (torch.zeros_like(key), torch.zeros_like(value)))]


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
            return CPTConfig(**common, **{name: peft_config[name] for name in _CPT_KEYS if name in peft_config}), []
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
