"""Our adapters in PEFT's two files: what they can hold, its configuration, its tensor."""

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
    PTuningConfig,
    join_layers,
)
from ..nn.config import HEADS
from .peft import CPT, CPT_KEYS, MULTITASK, Values


def is_expressible(config: Config, shapes: Sequence[LayerShape], base_model: Mapping[str, Any]) -> bool:
    """Whether PEFT's files can hold it: a prefix must be in every layer, with one shape and D = Dv.

    PEFT puts every soft prompt before the text, so one that stands in the text (`virtual_token_ids`) would be loaded
    without a word and be wrong; so would one before a stack that multiplies the embeddings of ids alone
    (`scales_ids`), and a prefix that leaves the text where it is (`position_offset=False`).
    """
    if not isinstance(config, PrefixTuningConfig):
        return getattr(config, "virtual_token_ids", None) is None and not base_model.get("scales_ids")
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
        return {"peft_type": CPT, **{name: getattr(config, name) for name in CPT_KEYS}}
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


def for_seq2seq(values: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The inverse of `seen_by_seq2seq`: the pair of each layer, and an empty one for cross-attention, which PEFT drops.

    With as many pairs as the decoder has layers PEFT would come around to the first halfway, so the file says that
    there are twice as many; PEFT makes a cache of so many layers, of which the decoder reads those that it has.
    """
    return [pair for key, value in values for pair in ((key, value), (torch.zeros_like(key), torch.zeros_like(value)))]
