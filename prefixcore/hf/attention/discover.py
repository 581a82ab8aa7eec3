"""Which attention modules of a model reach transformers' attention interface, and what their heads look like.

Nothing is guessed from names or configurations: the model reads a few tokens through a recording attention function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...nn.config import PLACES
from ..families import AS_DECODER, RESETS_AT_FIRST_POSITION, known_encoders, known_families, text_config
from ..model.devices import device_of
from ..model.sample_inputs import CACHES, reads_tokens
from ..model.signature import argument_names
from .interface import ATTENTION
from .recording import AttentionCall, record

OTHER_LAYERS = {"linear_attention", "mamba", "recurrent", "conv", "moe", "mlp"}
"""Values of `config.layer_types` that mean no attention: linear attention, state spaces, convolutions."""

BOTH = {"hybrid", "hybrid_sliding"}
"""Values that mean attention and one of these beside it."""

_KNOWN_ARGUMENTS = {
    "dropout", "scaling", "is_causal", "sliding_window", "softcap", "s_aux", "position_ids", "cu_seq_lens_q",
    "cu_seq_lens_k", "max_length_q", "max_length_k", "use_cache", "past_key_values", "cache_position",
    "output_hidden_states", "return_dict", "logits_to_keep", "num_items_in_batch", "output_router_logits",
    "deterministic",
}  # fmt: skip
"""Arguments of an attention call that the op honours, or that do not concern it."""


class NotOnInterfaceError(NotImplementedError):
    """Nothing in a model calls transformers' attention interface: its attention has other ways, or it has none."""


_NO_ENCODER = "{} reads {} and is no encoder; a prefix is for models that read input_ids, and for encoders"


def discover(model: PreTrainedModel) -> list[AttentionCall]:
    """The self-attention layers of the text decoder, or of the encoder, in order, each checked to fit a prefix.

    Of an encoder whose layers share a module, that one again and again.

    Raises:
        NotOnInterfaceError: no layer.
        NotImplementedError: not every layer, or a layer in a way that is not understood.
    """
    model_class = type(model).__name__
    if model.config.is_encoder_decoder:
        return discover_encoder_decoder(model)
    if not reads_tokens(model) and model.can_generate():
        raise NotImplementedError(_NO_ENCODER.format(model_class, model.main_input_name))
    calls = record(model, torch.zeros(1, 1, dtype=torch.long, device=device_of(model)))
    if not calls:
        raise NotOnInterfaceError(
            f"{model_class} has no attention that calls transformers' attention interface; try a soft prompt "
            f"(PromptTuningConfig), or take a model of a known family: {known_families()}"
        )
    if is_encoder(model, calls):
        _check_encoder(model, calls)
        return calls
    if not reads_tokens(model):
        raise NotImplementedError(_NO_ENCODER.format(model_class, model.main_input_name))
    config = text_config(model)
    expected = expected_layers(config)
    modules = {call.module for call in calls}
    if len(modules) != expected or len(calls) != expected:
        raise NotImplementedError(
            f"{model_class} has {expected} layers with attention, but {len(modules)} attention modules were reached in "
            f"{len(calls)} calls; a prefix must reach each layer once. Known families: {known_families()}"
        )
    for call in calls:
        _check_call(call, model.can_generate() and getattr(config, "is_decoder", None) is False)
    _check_windows(config, [call.kwargs.get("sliding_window") for call in calls])
    return calls


def expected_layers(config: Any) -> int:
    """How many attention layers a decoder has, as its configuration says."""
    layer_types = getattr(config, "layer_types", None)
    layer_types = layer_types or getattr(config, "layers_block_type", None)  # of RecurrentGemma before 5.23
    layer_types = layer_types or ["full_attention"] * config.num_hidden_layers
    return sum(layer_type not in OTHER_LAYERS for layer_type in layer_types)


def has_other_layers(model: PreTrainedModel, calls: Sequence[Any]) -> bool:
    """Whether some layers of the decoder with these attention calls are no attention, or run more beside it."""
    config = text_config(model)
    kinds = set(getattr(config, "layer_types", None) or ())
    return len(calls) < config.num_hidden_layers or bool(kinds & BOTH)


def remembering_layers(config: Any) -> list[str]:
    """The kinds of layers that keep something else of what they have read than keys and values, by a configuration.

    A prefix does not reach them; a text, or a soft prompt, passes them.
    """
    return sorted(set(getattr(config, "layer_types", None) or ()) & (OTHER_LAYERS - {"moe", "mlp"} | BOTH))


def is_encoder(model: PreTrainedModel, calls: Sequence[AttentionCall]) -> bool:
    """Whether each token of the model sees all others, in every layer.

    A model that generates is none, whatever its configuration says: it is one that has to be told to be a decoder.
    """
    if model.config.is_encoder_decoder:
        return False
    return bool(calls) and not model.can_generate() and not any(call.is_causal for call in calls)


def moves_positions(model: PreTrainedModel, backbone: PreTrainedModel, calls: Sequence[AttentionCall]) -> bool:
    """Whether a text with a prefix stands P positions further on, as it would with the prefix in a cache.

    An encoder that reads a cache counts what it holds. P-tuning v2 and PEFT put their prefix there, and so move it. One
    without a cache has never had its positions moved by a prefix.
    """
    if model.config.is_encoder_decoder or text_config(model).model_type in RESETS_AT_FIRST_POSITION:
        return False
    names = set(argument_names(backbone))
    return not is_encoder(model, calls) or ("position_ids" in names and not names.isdisjoint(CACHES))


_ENCODER_LENGTH, _DECODER_LENGTH = 3, 2
"""How many tokens each stack reads, so that cross-attention is known by the number of its keys."""


def check_stacks(model: PreTrainedModel) -> None:
    """Raises NotImplementedError unless an encoder-decoder says which two models inside it are its stacks."""
    encoder, decoder = model.get_encoder(), model.get_decoder()
    stacks = isinstance(encoder, PreTrainedModel) and isinstance(decoder, PreTrainedModel)
    if not stacks or any(each is encoder for each in decoder.modules()) or encoder is model:
        raise NotImplementedError(
            f"{type(model).__name__} does not say which two models inside it encode and decode (its get_encoder() is "
            f"{type(encoder).__name__}, its get_decoder() {type(decoder).__name__}), so virtual tokens reach neither"
        )


def discover_encoder_decoder(model: PreTrainedModel) -> list[AttentionCall]:
    """The attention of both stacks in the order of its calls, each with its place.

    Raises:
        NotImplementedError: as of `discover`.
    """
    name, device = type(model).__name__, device_of(model)
    check_stacks(model)
    if "decoder_input_ids" not in argument_names(model.base_model):
        raise NotImplementedError(f"{name} is an encoder-decoder that takes no decoder_input_ids")
    ids = torch.zeros(1, _ENCODER_LENGTH, dtype=torch.long, device=device)
    inside = set(model.get_encoder().modules())
    found = []
    for call in record(model, ids, ids[:, :_DECODER_LENGTH]):
        is_own = call.key.shape[2] == _DECODER_LENGTH
        found.append(replace(call, place="encoder" if call.module in inside else "decoder" if is_own else "cross"))
    counts = [sum(call.place == place for call in found) for place in PLACES]
    if not all(counts) or counts[1] != counts[2] or len({call.module for call in found}) != len(found):
        raise NotImplementedError(
            f"{name} calls attention {counts[0]} times in its encoder and {counts[1]} times in its decoder, with "
            f"{counts[2]} calls across, through transformers' attention interface; a prefix must reach each layer once"
        )
    for call in found:
        _check_arguments(call, {"position_bias"})
    return found


def _check_encoder(model: PreTrainedModel, calls: list[AttentionCall]) -> None:
    """Raises NotImplementedError unless the attention calls are one for each layer, of its own tokens."""
    name, encoder = type(model).__name__, find_backbone(model, calls)
    expected = getattr(text_config(encoder), "num_hidden_layers", None)
    if len(calls) != expected:
        raise NotImplementedError(
            f"{name} has {expected} layers, but attention was called {len(calls)} times; a prefix must reach each "
            f"layer once. Known families of encoders: {known_encoders()}"
        )
    for call in calls:
        if call.key.shape[0] != 1:
            raise NotImplementedError(
                f"{call.name} cuts one input into {call.key.shape[0]} rows of attention, so it cannot be told which "
                f"prefix a row has. Known families of encoders: {known_encoders()}"
            )
        _check_arguments(call)


def _check_call(call: AttentionCall, may_be_decoder: bool) -> None:
    """Raises NotImplementedError for attention of a decoder that `prefix_attention` does not compute."""
    if call.kwargs.get("position_bias") is not None:
        raise NotImplementedError(
            f"{call.name} adds a bias to its scores that it computes from the text (position_bias), whose gradient "
            "prefix attention does not give"
        )
    _check_arguments(call)
    if not call.is_causal:
        hint = f". {AS_DECODER}" if may_be_decoder else ""
        raise NotImplementedError(
            f"{call.name} is not causal; in models that generate, prefixes are for decoders ({known_families()}){hint}"
        )


def _check_arguments(call: AttentionCall, also: set[str] | None = None) -> None:
    """Raises NotImplementedError for arguments and heads of attention that `prefix_attention` does not know."""
    unknown = {
        name
        for name, value in call.kwargs.items()
        if value is not None and value is not False and name not in _KNOWN_ARGUMENTS | (also or set())
    }
    if unknown:
        raise NotImplementedError(
            f"{call.name} calls attention with {', '.join(sorted(unknown))}, which prefix attention does not know"
        )
    if call.num_heads % call.shape.num_kv_heads:
        raise NotImplementedError(
            f"{call.name} has {call.num_heads} query heads on {call.shape.num_kv_heads} key heads, an uneven group"
        )


def _check_windows(config: Any, windows: list[int | None]) -> None:
    """Raises NotImplementedError unless each attention call is passed the window that its layer is configured with.

    `prefixcore.hf.attention.mask` reads the configuration and leaves a sliding window to attention, which reads its
    arguments.
    """
    window = getattr(config, "sliding_window", None)
    layer_types = [each for each in getattr(config, "layer_types", None) or () if each not in OTHER_LAYERS]
    layer_types = layer_types or ["sliding_attention"] * len(windows)
    for layer, (layer_type, found) in enumerate(zip(layer_types, windows, strict=True)):
        expected = window if "sliding" in layer_type else None
        # A window that the configuration has under another name (Inkling) is in the mask, which says everything then.
        if expected != found and not ("sliding" in layer_type and window is None):
            raise NotImplementedError(
                f"attention layer {layer} of {config.model_type} should have the sliding window {expected}, but tells "
                f"its attention function {found}; known families: {known_families()}"
            )


def find_backbone(model: PreTrainedModel, calls: list[AttentionCall]) -> PreTrainedModel:
    """The innermost model that holds every one of these layers and takes positions; of an encoder, what it reads.

    Raises:
        NotImplementedError: none takes `position_ids`.
    """
    if model.config.is_encoder_decoder:
        decoder: PreTrainedModel = model.get_decoder()
        return decoder
    needed = {model.main_input_name if is_encoder(model, calls) else "position_ids"}
    if calls[0].cache_layer is not None:  # its positions are counted from what the cache holds, or given
        needed = set(CACHES)
    paths = [call.name.split(".") for call in calls]
    common = next((i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), len(paths[0]))
    for end in range(common, -1, -1):
        module = model.get_submodule(".".join(paths[0][:end]))
        if isinstance(module, PreTrainedModel) and needed & set(argument_names(module)):
            return module
    raise NotImplementedError(
        f"{type(model).__name__} takes no position_ids, so the sequence cannot be placed after the prefix; "
        f"known families: {known_families()}"
    )


def check_reached(backbone: PreTrainedModel, layers: list[nn.Module]) -> None:
    """Raises NotImplementedError unless the attention of `backbone` was switched to prefix attention."""
    configs: list[Any] = [backbone.config, *(layer.config for layer in layers if hasattr(layer, "config"))]
    for config in configs:
        if config._attn_implementation != ATTENTION:
            raise NotImplementedError(
                f"{type(backbone).__name__} keeps its attention implementation {config._attn_implementation!r}; "
                f"known families: {known_families()}"
            )
