"""`attach`: one line that lets an unchanged transformers model learn a prefix or a soft prompt."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..nn import Config, Prefix, PrefixTuningConfig, PromptTuningConfig, PTuningConfig, SoftPrompt
from .attachment import warn_of_dropout
from .attention import LAYER_PREFIX
from .discover import AttentionCall, discover, find_backbone
from .families import is_known, known_families, position_limit, text_config
from .handle import Handle
from .initialize import prefix_start, prompt_start
from .patch import ATTACHMENT, MODULE
from .prefix import PrefixAttachment
from .soft_prompt import SoftPromptAttachment
from .verify import verify_prefix, verify_soft_prompt


def attach(model: PreTrainedModel, config: Config, *, tokenizer: Any = None) -> Handle:
    """Freezes a transformers model and attaches virtual tokens to it, the only thing left to train.

    From then on `model(**batch).loss.backward()`, `model.generate(...)` and `Trainer(model, ...)` work as before.
    A prefix is seen by every query of every layer and takes no place in the cache; positions move by P, as in
    PEFT. A soft prompt stands before each row's text. Weights are never changed. The trainable module is
    `model.prefixcore`, so that `state_dict`, `Trainer` and `.to(...)` include it.

    Args:
        model: a transformers model, not wrapped (attach before DDP, `torch.compile` or PEFT).
        config: `PrefixTuningConfig`, `PromptTuningConfig` or `PTuningConfig`.
        tokenizer: for `init="text"`; also noted in the manifest.

    Returns:
        The handle: `parameters()` for the optimizer, `save(directory)`, `detach()`.

    Raises:
        TypeError: not a model or a config.
        ValueError: something is attached already, or the config does not fit the model.
        NotImplementedError: a model that a prefix or a prompt cannot reach. Known families are Llama, Mistral, Qwen2,
            Qwen3, Gemma 2, gpt-oss and GPT-2; others are checked on the spot and named in a warning.
        In every case the model is left as it was.
    """
    check_model(model)
    if isinstance(config, PrefixTuningConfig):
        calls, backbone = reach(model)
        chosen = choose(calls, config)
        shapes = [calls[i].shape for i in chosen]
        initial = prefix_start(model, config, chosen, shapes, tokenizer)
        module = Prefix(shapes, config, initial)
        return attach_prefix(model, backbone, [calls[i] for i in chosen], module, tokenizer)
    if isinstance(config, (PromptTuningConfig, PTuningConfig)):
        width = reach_input(model)
        prompt = SoftPrompt(width, config, prompt_start(model, config, width, tokenizer))
        return attach_soft_prompt(model, prompt, tokenizer)
    raise TypeError(
        f"config must be a PrefixTuningConfig, PromptTuningConfig or PTuningConfig, got {type(config).__name__}"
    )


def check_model(model: Any) -> None:
    """Raises unless `model` is a transformers model with nothing attached."""
    if not isinstance(model, PreTrainedModel):
        wrapped = isinstance(model, nn.Module) and any(isinstance(m, PreTrainedModel) for m in model.modules())
        hint = "; attach to the model inside, before it is wrapped" if wrapped else ""
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}{hint}")
    carriers = [name for name, m in model.named_modules() if ATTACHMENT in m.__dict__ or LAYER_PREFIX in m.__dict__]
    if carriers:
        raise ValueError(
            f"something is attached to {type(model).__name__} already (seen at {carriers[0] or 'the model itself'!r}); "
            "call handle.detach() first"
        )
    if hasattr(model, MODULE):
        raise ValueError(
            f"{type(model).__name__} has an attribute {MODULE!r} of its own, the name of the trainable module"
        )
    if model.main_input_name != "input_ids":
        raise NotImplementedError(
            f"{type(model).__name__} reads {model.main_input_name}; virtual tokens are for models that read input_ids"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model has parameters without values (on the meta device): load its weights first")


def reach(model: PreTrainedModel) -> tuple[list[AttentionCall], PreTrainedModel]:
    """The attention layers that a prefix would reach, and the decoder that holds them."""
    if model.config.output_attentions or text_config(model).output_attentions:
        raise ValueError("config.output_attentions is on, but prefix attention never forms weights: set it to False")
    calls = discover(model)
    backbone = find_backbone(model, calls)
    if not is_known(model):
        verify_prefix(model, backbone, calls)
        _say_unknown(model)
    return calls, backbone


def reach_input(model: PreTrainedModel) -> int:
    """E, of a model that a soft prompt can be put into."""
    kind = type(model).__name__
    if model.config.is_encoder_decoder:
        raise NotImplementedError(
            f"{kind} is an encoder-decoder; soft prompts are for decoders so far ({known_families()})"
        )
    if not model.can_generate() and model.base_model is not model:
        raise NotImplementedError(
            f"{kind} has a head that may count on where the text stands; soft prompts are for causal language models "
            "and models without a head so far, a prefix (PrefixTuningConfig) for any head"
        )
    embed: Any = model.get_input_embeddings()
    if getattr(embed, "weight", None) is None or embed.weight.dim() != 2:
        raise NotImplementedError(f"{kind} has no table of input embeddings [V, E]")
    width = embed.weight.shape[1]
    if not is_known(model):
        verify_soft_prompt(model, width)
        _say_unknown(model)
    return width


def choose(calls: list[AttentionCall], config: PrefixTuningConfig) -> list[int]:
    """The layers that get a prefix."""
    if config.layers is None:
        return list(range(len(calls)))
    if max(config.layers) >= len(calls):
        raise ValueError(
            f"layers asks for layer {max(config.layers)}, but the model has {len(calls)} attention layers "
            f"(0 to {len(calls) - 1})"
        )
    return list(config.layers)


def attach_prefix(
    model: PreTrainedModel,
    backbone: PreTrainedModel,
    calls: list[AttentionCall],
    module: Prefix,
    tokenizer: Any = None,
) -> Handle:
    """Attaches a prefix that exists."""
    _check_room(model, module.num_virtual_tokens)
    if any(parameter.requires_grad for parameter in module.parameters()):
        warn_of_dropout(model)
    module.to(calls[0].key.device).train(model.training)
    attachment = PrefixAttachment(model, backbone, module, calls)
    return Handle(attachment, [call.shape for call in calls], tokenizer)


def attach_soft_prompt(model: PreTrainedModel, module: SoftPrompt, tokenizer: Any = None) -> Handle:
    """Attaches a soft prompt that exists."""
    _check_room(model, module.num_virtual_tokens)
    embed: Any = model.get_input_embeddings()
    module.to(embed.weight.device).train(model.training)
    return Handle(SoftPromptAttachment(model, module, _packing_decoder(model)), [], tokenizer)


def _packing_decoder(model: PreTrainedModel) -> PreTrainedModel | str:
    """The decoder of a model that can be given packed batches with a soft prompt; or why it cannot."""
    if not is_known(model):
        return f"only known families can ({known_families()})"
    try:
        return find_backbone(model, discover(model))
    except NotImplementedError as error:  # a prefix would be refused, padded batches with a soft prompt are not
        return str(error)


def _check_room(model: PreTrainedModel, num_virtual_tokens: int) -> None:
    limit = position_limit(model)
    if limit is not None and num_virtual_tokens >= limit:
        raise ValueError(
            f"{num_virtual_tokens} virtual tokens leave no room for an input: {type(model).__name__} has learned "
            f"{limit} positions"
        )


def _say_unknown(model: PreTrainedModel) -> None:
    warnings.warn(
        f"{text_config(model).model_type!r} is not among the families that prefixcore is tested with "
        f"({known_families()}); attached virtual tokens made of a text acted as the text does, so it is attached",
        stacklevel=4,
    )
