"""`load`: attach an adapter that was saved."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from ..adapters import Adapter, AdapterError, compare_fingerprints, fingerprint, make_module, read_adapter
from ..nn import Prefix, PrefixTuningConfig
from .attaching import attach_prefix, attach_soft_prompt, check_model, find_attention_layers, find_hidden_size
from .discover import AttentionCall
from .handle import Handle


def load(model: PreTrainedModel, directory: str | Path, trainable: bool = False) -> Handle:
    """Attaches the adapter in `directory`, ours or one that PEFT wrote, to the model that it was trained for.

    Args:
        model: as for `attach`.
        directory: the adapter's folder.
        trainable: True: the module as it was saved, reparameterization included, so that training goes on where it
            stopped (the optimizer's state aside); an adapter that PEFT wrote goes on from its values. False: the final
            values, frozen.

    Returns:
        The handle, as of `attach`.

    Raises:
        AdapterError: a file or field that is missing, damaged or foreign, or another model's adapter; named.
        TypeError, ValueError, NotImplementedError: as of `attach`.

    After an error the model is as it was.

    Examples:
        >>> with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4)) as handle:
        ...     folder = handle.save("capitals")
        >>> with prefixcore.load(model, "capitals") as handle:
        ...     print(handle)
        Handle(prefix on LlamaForCausalLM, 4 virtual tokens, 0 trainable)
    """
    check_model(model)
    adapter = read_adapter(directory)
    if adapter.manifest is not None:
        compare_fingerprints(adapter.manifest.base_model, fingerprint(model))
    module = make_module(adapter, trainable=trainable)
    if isinstance(adapter.config, PrefixTuningConfig):
        assert isinstance(module, Prefix)
        calls, backbone = find_attention_layers(model)
        return attach_prefix(model, backbone, _layers_of(adapter, calls, directory), module)
    assert not isinstance(module, Prefix)
    hidden_size = find_hidden_size(model)
    if module.hidden_size != hidden_size:
        raise AdapterError(
            f"{directory}: its virtual tokens have {module.hidden_size} numbers, but the model's embeddings have "
            f"{hidden_size}; it was trained for another model"
        )
    return attach_soft_prompt(model, module)


def _layers_of(adapter: Adapter, calls: list[AttentionCall], directory: str | Path) -> list[AttentionCall]:
    """The attention layers that the adapter is for; AdapterError: the model lacks them, or their shapes differ."""
    if adapter.manifest is None and len(adapter.layers) != len(calls):
        raise AdapterError(
            f"{directory}: it has a prefix for {len(adapter.layers)} layers, but the model has {len(calls)} attention "
            "layers; it was trained for another model"
        )
    if max(adapter.layers) >= len(calls):
        raise AdapterError(
            f"{directory}: it has a prefix for layer {max(adapter.layers)}, but the model has {len(calls)} attention "
            "layers"
        )
    chosen = [calls[layer] for layer in adapter.layers]
    for layer, shape, call in zip(adapter.layers, adapter.layer_shapes, chosen, strict=True):
        if shape != call.shape:
            raise AdapterError(
                f"{directory}: the prefix of layer {layer} is for {shape}, but the model has {call.shape}; "
                "it was trained for another model"
            )
    return chosen
