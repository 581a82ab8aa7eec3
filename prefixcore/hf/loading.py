"""`load`: attach an adapter that was saved."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..adapters import AdapterError, compare_fingerprints, fingerprint
from ..adapters.files import MANIFEST_FILE, STATE_FILE
from ..adapters.module import build_module
from ..adapters.reading import AdapterHeader, read
from ..adapters.storage import naming
from ..nn import Prefix, SoftPrompt
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
    target = Target(model)
    module, layers = target.read(Path(directory), trainable)
    if not isinstance(module, Prefix):
        return attach_soft_prompt(model, module)
    calls, backbone = target.attention_layers
    return attach_prefix(model, backbone, calls, layers, module)


class Target:
    """A model that adapters are to be loaded for. What is found out about it is found out once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.folder = Path()

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.model)

    @cached_property
    def attention_layers(self) -> tuple[list[AttentionCall], PreTrainedModel]:
        return find_attention_layers(self.model)

    @cached_property
    def hidden_size(self) -> int:
        return find_hidden_size(self.model)

    def read(self, folder: Path, trainable: bool) -> tuple[Prefix | SoftPrompt, list[int]]:
        """The module of the adapter in `folder`, and the layers that it is for.

        Raises:
            AdapterError: as of `load`.
        """
        self.folder = folder
        adapter = read(folder, fits=self.check, state=trainable)
        with naming(folder / STATE_FILE):  # the values were checked against the header
            return build_module(adapter, trainable=trainable), adapter.layers

    def check(self, header: AdapterHeader) -> None:
        """Raises AdapterError unless the adapter is for this model."""
        if header.manifest is not None:
            with naming(self.folder / MANIFEST_FILE):
                compare_fingerprints(header.manifest.base_model, self.fingerprint)
        if header.hidden_size is None:
            with naming(self.folder):
                _check_layers(header, self.attention_layers[0])
        elif header.hidden_size != self.hidden_size:
            raise AdapterError(
                f"{self.folder}: its virtual tokens have {header.hidden_size} numbers, but the model's embeddings have "
                f"{self.hidden_size}; it was trained for another model"
            )


def _check_layers(header: AdapterHeader, calls: list[AttentionCall]) -> None:
    """Raises AdapterError if the model lacks a layer that the adapter is for, or has others there."""
    if header.manifest is None and len(header.layers) != len(calls):
        raise AdapterError(
            f"it has a prefix for {len(header.layers)} layers, but the model has {len(calls)} attention layers; it was "
            "trained for another model"
        )
    if max(header.layers) >= len(calls):
        raise AdapterError(
            f"it has a prefix for layer {max(header.layers)}, but the model has {len(calls)} attention layers"
        )
    for layer, shape in zip(header.layers, header.layer_shapes, strict=True):
        if shape != calls[layer].shape:
            raise AdapterError(
                f"the prefix of layer {layer} is for {shape}, but the model has {calls[layer].shape}; it was trained "
                "for another model"
            )
