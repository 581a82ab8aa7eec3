"""Initial values that take the model: from a text, or from tokens of the vocabulary.

Initialization decides how well prefix tuning does with little data: activations of real words beat random numbers
(Li and Liang, arXiv:2101.00190, section 7.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..nn import (
    Config,
    CPTConfig,
    LayerShape,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    fit_ids,
    tensor_init,
    vocab_ids,
)
from ..nn.initialization import check_tensor
from .attention.discover_cached import record_again
from .attention.patch import frozen_run
from .attention.recording import AttentionCall, record
from .families import text_config
from .model.devices import device_of
from .model.sample_inputs import reads_tokens, sample_inputs
from .model.sharded import embedded
from .model.tensor_parallel import agree_on
from .positions.position_table import position_limit
from .positions.rotary import turn, why_fixed


def initial_prefix(
    model: PreTrainedModel,
    config: PrefixTuningConfig,
    layers: Sequence[int],
    shapes: Sequence[LayerShape],
    tokenizer: Any = None,
    found: Sequence[AttentionCall] = (),
) -> list[tuple[Tensor, Tensor]] | None:
    """One (key [Hkv, P, D], value [Hkv, P, Dv]) for each of `layers`, or None where `Prefix` draws it itself.

    The keys and values of a text are those that the frozen model computes for it at positions 0 to P-1, so that the
    untrained prefix has the effect of the text before the input; on a model with layers that are no attention, without
    what those remember of the text. With `position_offset=False` they are turned back by P, to the same effect, where
    positions are rotary; else they stay as computed.

    Args:
        model: the frozen model.
        config: its `init` says where the prefix comes from.
        layers: the indices of the layers that get a prefix.
        shapes: the shape of each of these layers.
        tokenizer: reads `config.init_text`; None: the one that `config.tokenizer_name_or_path` names.
        found: the attention calls that say how the layers are reached; none: by transformers' attention interface.
    """
    if config.init is not None and not isinstance(config.init, str):
        return tensor_init(config.init, shapes, config.num_virtual_tokens)
    if not reads_tokens(model) and config.init in ("text", "vocab"):
        raise ValueError(
            f"init={config.init!r} starts from tokens, but {type(model).__name__} reads {model.main_input_name}: take "
            "init='random', 'zero' or tensors"
        )
    ids = initial_ids(model, config, tokenizer)
    if ids is None:
        return None
    ids = agree_on(model, ids)
    limit = position_limit(model)
    if limit is not None and len(ids) >= limit:
        raise ValueError(f"{len(ids)} virtual tokens leave no room: the model has learned {limit} positions")
    text = torch.tensor([ids], device=device_of(model))
    calls = record_again(model, text, found) if found else record(model, text)
    pairs = [(calls[layer].key[0].float(), calls[layer].value[0].float()) for layer in layers]
    if not config.position_offset and why_fixed(model) is None:
        return turn(model, pairs, -len(ids), layers)
    return pairs


def initial_prompt(
    model: PreTrainedModel,
    config: PromptTuningConfig | PTuningConfig | MultitaskPromptTuningConfig | CPTConfig,
    hidden_size: int,
    tokenizer: Any = None,
) -> Tensor | None:
    """Embeddings [P, E], fp32, or None where `SoftPrompt` draws them itself."""
    if isinstance(config.init, Tensor):
        check_tensor("init", config.init, (config.num_virtual_tokens or config.init.shape[0], hidden_size))
        return config.init
    ids = initial_ids(model, config, tokenizer)
    if ids is None:
        return None
    ids = agree_on(model, ids)
    embed = model.get_input_embeddings()
    with frozen_run(model):
        # The module is called, not its table read: some families (Gemma) scale embeddings in it.
        inputs = sample_inputs(model, torch.tensor([ids], device=device_of(model)))
        return embedded(model, embed, ids, inputs).float()


def initial_ids(model: PreTrainedModel, config: Config, tokenizer: Any = None) -> list[int] | None:
    """The P token ids that `config` starts from, or None if it starts from none."""
    vocabulary = getattr(text_config(model), "vocab_size", 0)
    if isinstance(config, CPTConfig):
        if max(config.cpt_token_ids) >= vocabulary:
            raise ValueError(
                f"cpt_token_ids has the token id {max(config.cpt_token_ids)}, but the model's vocabulary has "
                f"{vocabulary}: the examples were read by another model's tokenizer"
            )
        return config.cpt_token_ids
    if config.init == "vocab":
        assert config.num_virtual_tokens is not None
        return vocab_ids(vocabulary, config.num_virtual_tokens, config.seed).tolist()
    if config.init == "text":
        tokenizer = tokenizer if tokenizer is not None else _tokenizer(config)
        ids = fit_ids(tokenizer(config.init_text)["input_ids"], config.num_virtual_tokens)
        if max(ids) >= vocabulary:
            raise ValueError(
                f"init_text has the token id {max(ids)}, but the model's vocabulary has {vocabulary}: "
                "this tokenizer is another model's"
            )
        return ids
    if config.init == "tensor":
        raise ValueError(
            "init='tensor' stands for values that are kept elsewhere: give the tensors themselves as init, or load "
            "the adapter with prefixcore.load"
        )
    return None


def _tokenizer(config: Config) -> Any:
    if config.tokenizer_name_or_path is None:
        raise ValueError(
            "init='text' needs a tokenizer: attach(model, config, tokenizer=tokenizer), or set "
            "tokenizer_name_or_path in the config"
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(config.tokenizer_name_or_path)
