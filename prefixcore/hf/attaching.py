"""`attach`: one line that lets an unchanged transformers model learn a prefix or a soft prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..adapters.scaled_ids import reads_scaled_ids
from ..adapters.tensors import TensorFile
from ..nn import (
    Config,
    CPTConfig,
    CPTPrompt,
    MultitaskPrompt,
    MultitaskPromptTuningConfig,
    Prefix,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    SoftPrompt,
)
from .attention.discover import moves_positions
from .attention.interface import LAYER
from .attention.patch import ATTACHMENT, MODULE
from .attention.recording import AttentionCall
from .attention.refusals import warn_of_dropout
from .bank.attached import AnyPrompt, Attached
from .bank.bank import Bank
from .bank.beside_peft import warn_of_frozen_peft
from .bank.heads import find_heads
from .checkpoint import install
from .handle import Handle
from .initialize import initial_prefix, initial_prompt
from .model.devices import device_of, without_values
from .model.tensor_parallel import parts_unseen
from .positions.position_table import position_limit
from .reaching import find_attention_layers, find_decoder, find_hidden_size


def attach(model: PreTrainedModel, config: Config, *, tokenizer: Any = None) -> Handle:
    """Freezes a transformers model and attaches virtual tokens to it, the only thing left to train.

    From then on `model(**batch).loss.backward()`, `model.generate(...)` and `Trainer(model, ...)` work as before.
    A prefix is seen by every query of every layer and is not kept in the cache; positions move by P, as in PEFT. A
    soft prompt stands before the text of each batch row. Weights are never changed. The trainable module, in float32
    whatever the model's dtype, is `model.prefixcore`, so that `state_dict`, `Trainer` and `.to(...)` include it.

    Args:
        model: a transformers model, not wrapped (attach before DDP, `torch.compile` or PEFT).
        config: `PrefixTuningConfig`, `PromptTuningConfig`, `PTuningConfig`; `MultitaskPromptTuningConfig`, with which
            each batch row names its task: `model(**batch, task_ids=[0, 2])`; or `CPTConfig`, whose loss is over the
            answers of its examples too: `model(**batch, input_type_mask=types)`.
        tokenizer: reads `init_text`, where `init="text"`; named in the manifest of a saved adapter.

    Returns:
        The handle: `parameters()` for the optimizer, `save(directory)`, `detach()`.

    Raises:
        TypeError: `model` is not a transformers model, or `config` not one of these.
        ValueError: something is attached already, or the config does not fit the model.
        NotImplementedError: a model that a prefix or a soft prompt cannot reach. Known families are Llama, Mistral,
            Qwen2, Qwen3, Gemma 2, gpt-oss and GPT-2; the encoders BERT, RoBERTa, XLM-RoBERTa, ELECTRA, ALBERT,
            DistilBERT, ModernBERT and ViT; the encoder-decoders BART, mBART, Pegasus, Marian, M2M100, T5, mT5 and
            Whisper. Bloom, Falcon, MPT, GPT-Neo, GPT-J, CodeGen and XGLM take a prefix through their cache,
            concatenated as in PEFT. Others are checked on the spot, and named in a warning where no test names their
            class.

    After an error the model is as it was.

    Examples:
        >>> config = prefixcore.PrefixTuningConfig(init_text="France -> Paris")
        >>> handle = prefixcore.attach(model, config, tokenizer=tokenizer)
        >>> handle
        Handle(prefix on LlamaForCausalLM, 15 virtual tokens, 1,920 trainable)
        >>> batch = tokenizer("Norway -> Oslo", return_tensors="pt")
        >>> model(**batch, labels=batch["input_ids"]).loss.backward()
        >>> handle.detach()
    """
    check_model(model)
    check_config(config)
    check_tokenizer(tokenizer)
    with torch.inference_mode(False):  # what is made inside of it can never be trained
        if isinstance(config, PrefixTuningConfig):
            calls, backbone = find_attention_layers(model)
            prefix, layers = make_prefix(model, config, calls, tokenizer)
            return attach_prefix(model, backbone, calls, layers, prefix, tokenizer)
        prompt = make_prompt(model, config, find_hidden_size(model), tokenizer)
        return attach_soft_prompt(model, prompt, tokenizer)


def check_config(config: Any) -> None:
    """Raises unless `config` says what to attach."""
    kinds = (PrefixTuningConfig, PromptTuningConfig, PTuningConfig, MultitaskPromptTuningConfig, CPTConfig)
    if not isinstance(config, kinds):
        names = [kind.__name__ for kind in kinds]
        name, hint = type(config).__name__, ""
        if name in names:
            hint = (
                f" of {type(config).__module__.partition('.')[0]}: give prefixcore.{name} the same arguments, or "
                "peft.get_peft_model(model, config) to prefixcore.accelerate"
            )
        raise TypeError(f"config must be a {', '.join(names[:-1])} or {names[-1]} of prefixcore, got {name}{hint}")


def check_tokenizer(tokenizer: Any) -> None:
    """Raises TypeError if the name of a tokenizer was given in place of one."""
    if isinstance(tokenizer, (str, Path)):
        raise TypeError(
            f"tokenizer must be a tokenizer or None, got the text {str(tokenizer)!r}; give "
            "transformers.AutoTokenizer.from_pretrained of it, or the text as tokenizer_name_or_path of the config"
        )


def make_prefix(
    model: PreTrainedModel, config: PrefixTuningConfig, calls: list[AttentionCall], tokenizer: Any = None
) -> tuple[Prefix, list[int]]:
    """A prefix with its initial values, and the layers that it is for, places in `calls`."""
    layers = choose_layers(calls, config)
    if config.where is not None:  # kept as layers, too, so that an adapter says which without its model
        config = replace(config, layers=layers)
    shapes = [calls[layer].shape for layer in layers]
    module = Prefix(shapes, config, initial_prefix(model, config, layers, shapes, tokenizer, calls))
    return module.to(calls[0].key.device).train(model.training), layers


def make_prompt(model: PreTrainedModel, config: Any, hidden_size: int, tokenizer: Any = None) -> AnyPrompt:
    """A soft prompt, or those of several tasks, with initial values."""
    if isinstance(config, MultitaskPromptTuningConfig):
        if reads_scaled_ids(model):
            raise NotImplementedError(
                f"{type(model).__name__} multiplies the embeddings of ids (scale_embedding), and so those of virtual "
                "tokens, which multitask prompt tuning has no file for: train a soft prompt for each task, in a "
                "PromptBank"
            )
        if config.source_init is None:
            return MultitaskPrompt(hidden_size, config, initial_prompt(model, config, hidden_size, tokenizer))
        file = Path(str(config.prompt_tuning_init_state_dict_path))
        with TensorFile(file, None) as source:
            return MultitaskPrompt(hidden_size, config, source=source.read())
    if isinstance(config, CPTConfig) and (not model.can_generate() or model.config.is_encoder_decoder):
        raise NotImplementedError(
            f"context-aware prompt tuning is for causal language models, and {type(model).__name__} is none"
        )
    initial = initial_prompt(model, config, hidden_size, tokenizer)
    if isinstance(config, CPTConfig):
        assert initial is not None
        return CPTPrompt(hidden_size, config, initial)
    return SoftPrompt(hidden_size, config, initial)


def check_model(model: Any) -> None:
    """Raises unless `model` is a transformers model with nothing attached."""
    if not isinstance(model, PreTrainedModel):
        text = isinstance(model, (str, Path))
        got = f"the text {str(model)!r}" if text else type(model).__name__
        raise TypeError(f"model must be a transformers PreTrainedModel, got {got}{_how_to_mend(model)}")
    found = [name for name, m in model.named_modules() if ATTACHMENT in m.__dict__ or LAYER in m.__dict__]
    if found:
        raise ValueError(
            f"something is attached to {type(model).__name__} already (seen at {found[0] or 'the model itself'!r}); "
            "call handle.detach() first, or make a prefixcore.PromptBank for several adapters on one model"
        )
    if hasattr(model, MODULE):
        raise ValueError(
            f"{type(model).__name__} has an attribute {MODULE!r} of its own, the name of the trainable module"
        )
    stage = getattr(model, "_pp_stage", None)
    if stage is not None and stage.pp_size > 1:
        raise NotImplementedError(
            f"the layers of {type(model).__name__} were shared out to {stage.pp_size} processes when it was loaded "
            "(pp_size), by which transformers runs forwards without a loss or a gradient: load the whole model, attach "
            "and give the handle to prefixcore.pipeline_stage; to generate, load it with device_map or tp_size"
        )
    if mesh := parts_unseen(model):
        raise NotImplementedError(
            f"the weights of {type(model).__name__} are in parts over {mesh.size()} processes and do not say so, as "
            "before transformers 5.16, so that no adapter could tell its model: install transformers 5.16 or newer, or "
            "load the model without tp_size"
        )
    if missing := without_values(model):
        raise ValueError(
            f"the model has parameters without values (on the meta device), as {missing[0]} is: load its weights first"
        )


def _how_to_mend(model: Any) -> str:
    """What to give in place of something that is no transformers model."""
    if isinstance(model, (str, Path)):
        return "; load it: transformers.AutoModelForCausalLM.from_pretrained of it"
    if hasattr(model, "num_virtual_tokens"):
        return "; give the model first, then the config"
    if isinstance(getattr(model, "model", None), PreTrainedModel) and not isinstance(model, nn.Module):
        return "; give its .model"
    if not isinstance(model, nn.Module) or not any(isinstance(m, PreTrainedModel) for m in model.modules()):
        return ""
    if hasattr(model, "peft_config"):
        return (
            "; to run PEFT's own virtual tokens on prefixcore's ops, call prefixcore.accelerate(peft_model); to "
            "put virtual tokens beside a LoRA, give peft_model.get_base_model()"
        )
    return "; attach to the model inside, before it is wrapped"


def choose_layers(calls: list[AttentionCall], config: PrefixTuningConfig) -> list[int]:
    """The indices of the layers that get a prefix; ValueError: the model has no such layer."""
    if config.where is not None:
        if calls[0].place is None:
            raise ValueError(
                f"where={config.where!r} is for encoder-decoders, but the model has one stack of layers: leave it out"
            )
        found = [i for i, call in enumerate(calls) if call.place in config.where]
        if set(config.layers or ()) - set(found):
            raise ValueError(f"layers: where={config.where!r} has the layers {found}, got {config.layers}")
        return list(config.layers or found)
    if config.layers is None:
        return list(range(len(calls)))
    if max(config.layers) >= len(calls):
        raise ValueError(
            f"layers asks for layer {max(config.layers)}, but the model has {len(calls)} attention layers "
            f"(0 to {len(calls) - 1}), which are counted without any others"
        )
    return list(config.layers)


def attach_prefix(
    model: PreTrainedModel,
    backbone: PreTrainedModel,
    calls: list[AttentionCall],
    layers: list[int],
    module: Prefix,
    tokenizer: Any = None,
    heads: list[str] | None = None,
) -> Handle:
    """Attaches a prefix that has been made, one (key, value) for each of `layers`, places in `calls`.

    `heads`: None: by its config.
    """
    heads = find_heads(model, module) if heads is None else heads
    if module.config.position_offset and moves_positions(model, backbone, calls):
        check_position_limit(model, module.num_virtual_tokens)
    if calls[0].cache_layer is None and any(parameter.requires_grad for parameter in module.parameters()):
        warn_of_dropout(model)
    warn_of_frozen_peft(model)
    module.to(calls[0].key.device).train(model.training)
    bank = Bank(model)
    bank.set_decoder(backbone, calls)
    shapes = [calls[layer].shape for layer in layers]
    return _finish(bank, Handle(bank, bank.add(Attached(module, layers)), shapes, tokenizer), heads)


def attach_soft_prompt(
    model: PreTrainedModel, module: AnyPrompt, tokenizer: Any = None, heads: list[str] | None = None
) -> Handle:
    """Attaches a soft prompt that has been made; `heads`: None: by its config."""
    heads = find_heads(model, module) if heads is None else heads
    check_position_limit(model, module.num_virtual_tokens)
    warn_of_frozen_peft(model)
    embed: Any = model.get_input_embeddings()
    module.to(device_of(embed)).train(model.training)
    decoder, calls = find_decoder(model)
    bank = Bank(model)
    bank.set_decoder(decoder, calls)
    return _finish(bank, Handle(bank, bank.add(Attached(module)), [], tokenizer), heads)


def _finish(bank: Bank, handle: Handle, heads: list[str]) -> Handle:
    """Attaches what goes along with virtual tokens: heads, and the way in which the model is saved."""
    handle.heads.attach(heads, bank.patch, trainable=handle.num_trainable > 0)
    install(bank)
    return handle


def check_position_limit(model: PreTrainedModel, num_virtual_tokens: int) -> None:
    limit = position_limit(model)
    if limit is not None and num_virtual_tokens >= limit:
        raise ValueError(
            f"{num_virtual_tokens} virtual tokens leave no room for an input: {type(model).__name__} has learned "
            f"{limit} positions"
        )
