"""How virtual tokens reach a model: its attention layers, its decoder, its input embeddings, each found and checked."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import PreTrainedModel

from .attention.discover import NotOnInterfaceError, check_stacks, discover, find_backbone, has_other_layers, is_encoder
from .attention.discover_cached import NoAttentionError, WindowError, cache_name, discover_cached
from .attention.recording import AttentionCall
from .families import (
    CACHED,
    is_known,
    is_known_encoder,
    is_known_encoder_decoder,
    known_encoders,
    known_families,
    text_config,
)
from .model.own_words import own_words
from .model.sample_inputs import reads_tokens
from .model.signature import argument_names
from .positions.model_inputs import OTHER, SEQUENCE, head_of
from .tested_classes import PREFIX, SOFT_PROMPT, TESTED
from .verify import check_causal, verify_prefix, verify_soft_prompt
from .verify_encoder import verify_encoder, verify_encoder_prompt
from .verify_hybrid import verify_hybrid


def find_attention_layers(model: PreTrainedModel) -> tuple[list[AttentionCall], PreTrainedModel]:
    """One attention call for each layer that a prefix reaches, and the decoder that holds the layers.

    Raises:
        ValueError, NotImplementedError: a prefix cannot be attached to this model.
    """
    if model.config.output_attentions or text_config(model).output_attentions:
        raise ValueError("config.output_attentions is on, but prefix attention never forms weights: set it to False")
    try:
        return _through_interface(model)
    except NotImplementedError as error:
        refusal = error
    # A known family is never slower in silence: where the interface does not reach it, something is wrong with it.
    if is_known(model) or model.config.is_encoder_decoder or not reads_tokens(model):
        raise refusal
    try:
        return _through_cache(model)
    except NotImplementedError as error:
        if isinstance(refusal, NotOnInterfaceError) and isinstance(error, NoAttentionError):
            raise NotImplementedError(
                f"{type(model).__name__} has no attention that a prefix reaches: nothing in it calls transformers' "
                "attention interface, or asks a cache of transformers for keys and values; try a soft prompt "
                f"(PromptTuningConfig), or take a model of a known family: {known_families()}"
            ) from None
        if isinstance(refusal, NotOnInterfaceError) or isinstance(error, WindowError):
            raise NotImplementedError(f"{refusal}. Nor can a prefix be put into its cache: {error}") from None
        raise refusal from None


def _through_interface(model: PreTrainedModel) -> tuple[list[AttentionCall], PreTrainedModel]:
    """The layers that transformers' attention interface reaches, as of `find_attention_layers`."""
    with own_words(model, "a prefix"):
        calls = discover(model)
    backbone = find_backbone(model, calls)
    concatenated = "a prefix computed what concatenated keys and values do"
    if model.config.is_encoder_decoder:
        if not is_known_encoder_decoder(model):
            body: Any = model.base_model
            verify_encoder(model, body, calls)
            _warn_of_unknown_family(model, PREFIX, concatenated)
    elif is_encoder(model, calls):
        if not is_known_encoder(model):
            verify_encoder(model, backbone, calls)
            _warn_of_unknown_family(model, PREFIX, concatenated)
    elif has_other_layers(model, calls):
        verify_hybrid(model, backbone, calls)
        _warn_of_unknown_family(model, PREFIX, concatenated)
    else:
        if not is_tested(model):
            verify_prefix(model, backbone, calls)
        if not is_known(model):
            _warn_of_unknown_family(model, PREFIX)
    return calls, backbone


def _through_cache(model: PreTrainedModel) -> tuple[list[AttentionCall], PreTrainedModel]:
    """The layers that ask a cache for their keys and values, as of `find_attention_layers`."""
    with own_words(model, "a prefix"):
        calls = discover_cached(model)
    backbone = find_backbone(model, calls)
    if text_config(model).model_type not in CACHED:
        check_causal(model, "a prefix")
        verify_prefix(model, backbone, calls)
        _warn_of_unknown_family(model, PREFIX)
    return calls, backbone


def find_hidden_size(model: PreTrainedModel) -> int:
    """E, the width of the model's input embeddings.

    Raises:
        NotImplementedError: a soft prompt cannot be attached to this model.
    """
    model_class = type(model).__name__
    if not reads_tokens(model):
        raise NotImplementedError(
            f"{model_class} reads {model.main_input_name}; soft prompts are for models that read input_ids (an encoder "
            "can have a prefix: PrefixTuningConfig)"
        )
    if model.config.is_encoder_decoder:
        check_stacks(model)
        try:
            table: Any = model.get_encoder().get_input_embeddings()
        except (AttributeError, NotImplementedError):  # transformers' own of an encoder that has none
            raise NotImplementedError(f"the encoder of {model_class} has no table of input embeddings") from None
        width = _width(model, table)
        if not is_known_encoder_decoder(model):
            verify_encoder_prompt(model, width)
            _warn_of_unknown_family(model, SOFT_PROMPT)
        return width
    if head_of(model) == OTHER:
        raise NotImplementedError(
            f"{model_class} has a head that may count on where the text stands; soft prompts are for causal and masked "
            "language models, for heads of classification and question answering (...ForSequenceClassification, "
            "...ForTokenClassification, ...ForQuestionAnswering) and models without a head so far, a prefix "
            "(PrefixTuningConfig) for any head"
        )
    hidden_size = _width(model, model.get_input_embeddings())
    if not is_tested(model):
        check_causal(model)
        try:
            verify_soft_prompt(model, hidden_size)
        except NotImplementedError as error:
            raise _reason_of(model) or error from None
    if not is_known(model) and not is_known_encoder(model):
        _warn_of_unknown_family(model, SOFT_PROMPT)
    return hidden_size


def _reason_of(model: PreTrainedModel) -> NotImplementedError | None:
    """Why a model that failed the check cannot have a soft prompt, where its arguments say so; None: they do not."""
    name, names = type(model).__name__, argument_names(model)
    if "state" in names and cache_name(model) is None:
        return NotImplementedError(
            f"{name} keeps what it has read in an argument of its own (state) and in no cache of transformers, so "
            "generate could not go on behind a soft prompt"
        )
    if "inputs_embeds" not in names:
        return NotImplementedError(f"{name} takes no inputs_embeds, which a soft prompt is part of")
    return None


def _width(model: PreTrainedModel, embed: Any) -> int:
    if getattr(embed, "weight", None) is None or embed.weight.dim() != 2:
        raise NotImplementedError(f"{type(model).__name__} has no table of input embeddings [V, E]")
    width: int = embed.weight.shape[1]
    return width


def find_decoder(model: PreTrainedModel) -> tuple[PreTrainedModel | str, list[AttentionCall]]:
    """The decoder inside `model` whose attention a soft prompt may use, and its layers; or, as text, why there is none.

    Without one a soft prompt works with padded batches and dynamic caches.
    """
    if model.config.is_encoder_decoder:  # whose stacks are called one by one; attention is left as it is
        return model.get_decoder(), []
    if not is_known(model):
        return f"only known families can ({known_families()})", []
    if head_of(model) == SEQUENCE:
        return "its head gives one output a row", []
    try:
        calls = discover(model)
        if is_encoder(model, calls):
            return "its tokens see later ones, so each text changes what the prompt before it is", []
        return find_backbone(model, calls), calls
    except NotImplementedError as error:
        return str(error), []


def is_tested(model: PreTrainedModel) -> bool:
    """Whether the model is a text model of a known family: not one inside of another, which has ways of its own."""
    return is_known(model) and text_config(model) is model.config


def _warn_of_unknown_family(
    model: PreTrainedModel, method: str, found: str = "attached virtual tokens made of a text acted as the text does"
) -> None:
    """Warns of a class that the table of models (`docs/models.md`) does not say to work."""
    if type(model).__name__ in TESTED[method]:
        return
    warnings.warn(
        f"{text_config(model).model_type!r} is not among the families that prefixcore is tested with "
        f"({known_families()}, {known_encoders()}); {found}, so it is attached",
        stacklevel=5 if method == PREFIX else 4,
    )
