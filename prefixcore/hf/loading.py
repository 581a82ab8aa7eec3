"""`load`: attach an adapter that was saved."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .._text import printable
from ..adapters import AdapterError, Manifest, compare_fingerprints, fingerprint
from ..adapters.files import MANIFEST_FILE, MODEL_FILE, STATE_FILE, find_adapter
from ..adapters.header import AdapterHeader
from ..adapters.hub import local_folder
from ..adapters.module import build_module
from ..adapters.reading import read
from ..adapters.same_model import find_differences
from ..adapters.scaled_ids import reads_scaled_ids
from ..adapters.storage import naming
from ..nn import CPTPrompt, Prefix, PrefixTuningConfig
from .attaching import (
    attach_prefix,
    attach_soft_prompt,
    check_model,
    choose_layers,
)
from .attention.recording import AttentionCall
from .bank.attached import AnyPrompt
from .bank.cpt_calls import prompt_of_examples
from .bank.heads import check_heads
from .families import text_config
from .handle import Handle
from .initialize import initial_prompt
from .reaching import find_attention_layers, find_hidden_size


def load(
    model: PreTrainedModel,
    directory: str | Path,
    trainable: bool = False,
    *,
    strict: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Handle:
    """Attaches the adapter in `directory`, ours or one that PEFT wrote, to the model that it was trained for.

    That model in another form is known again: another dtype, quantised or not, with tokens added to its vocabulary, its
    files cut in another way, with PEFT's LoRA inside or without.

    Args:
        model: as for `attach`.
        directory: the adapter's folder, or a checkpoint that Trainer wrote; or its name on the Hugging Face Hub,
            `user/repository` (`prefixcore.adapters.download`).
        trainable: True: the module as it was saved, reparameterization included, so that training goes on where it
            stopped (the optimizer's state aside); an adapter that PEFT wrote goes on from its values. False: the final
            values, frozen.
        strict: False: a model that does not look like the one it was trained for is taken too, with a warning, as long
            as the shapes fit; what differs stands in the manifest of whatever is saved from then on.
        revision, token: of an adapter on the Hub: a branch, a tag or a commit, and the user's token.

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
    target, folder = Target(model), local_folder(directory, revision=revision, token=token)
    with torch.inference_mode(False):  # what is made inside of it can never be trained
        found = target.read(folder, trainable, strict)
        if isinstance(found.module, Prefix):
            calls, backbone = target.attention_layers
            handle = attach_prefix(model, backbone, calls, found.layers, found.module, heads=found.heads)
        else:
            handle = attach_soft_prompt(model, found.module, heads=found.heads)
        handle.heads.load(found.head_tensors)
    handle.forced, handle.source = found.forced, found.manifest
    return handle


class Found(NamedTuple):
    """What an adapter's folder holds.

    Attributes:
        module: makes its virtual tokens.
        layers: of a prefix, the attention layers that it is for.
        heads: the names of the modules that it brings along.
        head_tensors: their tensors, by their names in the model.
        forced: in what the model is not the one that it was trained for.
        manifest: that of the folder, if it has one.
    """

    module: Prefix | AnyPrompt
    layers: list[int]
    heads: list[str]
    head_tensors: Mapping[str, Tensor]
    forced: tuple[str, ...]
    manifest: Manifest | None


class Target:
    """A model that adapters are to be loaded for. What is found out about it is found out once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.folder = Path()
        self.strict = True
        self.forced: list[str] = []
        self.heads: list[str] = []
        self.leave_out: list[str] = []

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.model, self.leave_out)

    @cached_property
    def attention_layers(self) -> tuple[list[AttentionCall], PreTrainedModel]:
        return find_attention_layers(self.model)

    @cached_property
    def hidden_size(self) -> int:
        return find_hidden_size(self.model)

    def read(self, folder: Path, trainable: bool, strict: bool = True) -> Found:
        """What the adapter in `folder` holds, which is for this model.

        Raises:
            AdapterError: as of `load`.
        """
        self.folder, self.strict, self.forced = find_adapter(folder), strict, []
        adapter = read(self.folder, fits=self.check, state=trainable)
        layers, config = adapter.layers, adapter.config
        if adapter.manifest is None and isinstance(config, PrefixTuningConfig) and config.where is not None:
            layers = choose_layers(self.attention_layers[0], config)
            adapter = replace(adapter, tensors=adapter.tensors[: len(layers)])
        with naming(self.folder / STATE_FILE):  # the values were checked against the header
            module = build_module(adapter, trainable=trainable)
        if trainable and isinstance(module, CPTPrompt) and adapter.training_state is None:
            with naming(self.folder):  # PEFT's files hold the sum of examples and of what was learned
                module = self._go_on_from(module)
        if adapter.manifest is None and isinstance(module, Prefix) and module.config.where is not None:
            module.config = replace(module.config, layers=layers)
        earlier = [] if adapter.manifest is None else adapter.manifest.base_model.get("forced", [])
        forced = tuple(dict.fromkeys([*earlier, *self.forced]))
        return Found(module, layers, self.heads, adapter.heads, forced, adapter.manifest)

    def _go_on_from(self, module: CPTPrompt) -> CPTPrompt:
        examples = initial_prompt(self.model, module.config, module.hidden_size)
        assert examples is not None
        return prompt_of_examples(module.bake(), examples.cpu(), module.config)

    def check(self, header: AdapterHeader) -> None:
        """Raises AdapterError unless the adapter is for this model."""
        if header.base_model is not None:
            if (
                header.manifest is None or "modules_to_save" in header.manifest.config
            ):  # version 0.1.0 had none, and counted every module
                self.leave_out = header.config.head_names
            with naming(self.folder / (MODEL_FILE if header.manifest is None else MANIFEST_FILE)):
                self._compare(header.base_model)
        with naming(self.folder):
            self.heads = check_heads(self.model, header.heads)
        if header.hidden_size is None:
            with naming(self.folder):
                _check_layers(header, self.attention_layers[0])
                if header.manifest is None and getattr(text_config(self.model), "num_kv_shared_layers", None):
                    raise AdapterError(
                        "PEFT gives layers that share keys (config.num_kv_shared_layers) the prefix of the layer that "
                        "they share them with; here each has its own, so it would not be the same: train one with "
                        "prefixcore.attach"
                    )
        elif header.peft_config is not None and reads_scaled_ids(self.model):
            raise AdapterError(
                f"{self.folder}: PEFT gives {type(self.model).__name__} embeddings of the text without the "
                "factor that the model has for ids (scale_embedding), and this soft prompt was trained so: train one "
                "with prefixcore.attach, or run it as PEFT does, by prefixcore.accelerate"
            )
        elif header.hidden_size != self.hidden_size:
            raise AdapterError(
                f"{self.folder}: its virtual tokens have {header.hidden_size} numbers, but the model's embeddings have "
                f"{self.hidden_size}; it was trained for another model"
            )

    def _compare(self, trained_for: dict[str, Any]) -> None:
        """Compares the model with the one the adapter was trained for; with `strict` off, differences are noted."""
        if self.strict:
            compare_fingerprints(trained_for, self.fingerprint)
            return
        found = find_differences(trained_for, self.fingerprint)
        self.forced = found.differences
        if found.differences or found.unchecked:
            text = "; ".join(found.differences) or found.unchecked
            warnings.warn(f"{self.folder} is loaded all the same: {printable(text)}", stacklevel=6)


def _check_layers(header: AdapterHeader, calls: list[AttentionCall]) -> None:
    """Raises AdapterError if the model lacks a layer that the adapter is for, or has others there."""
    layers = header.layers
    if header.manifest is None and isinstance(header.config, PrefixTuningConfig) and header.config.where is not None:
        layers = choose_layers(calls, header.config)
        if any(calls[layer].kwargs.get("position_bias") is not None for layer in layers):
            raise AdapterError(
                "PEFT puts its prefix at positions, to which the model adds a learned bias; a prefix here has none, so "
                "it would not be the same: train one with prefixcore.attach"
            )
        if len(header.layers) not in (len(layers), 2 * len(layers)):  # see `adapters.peft_writing.for_seq2seq`
            raise AdapterError(
                f"it has a prefix for {len(header.layers)} layers of a decoder, but the model's has {len(layers)}; it "
                "was trained for another model"
            )
    elif header.manifest is None and len(header.layers) != len(calls):
        raise AdapterError(
            f"it has a prefix for {len(header.layers)} layers, but the model has {len(calls)} attention layers; it was "
            "trained for another model"
        )
    if max(layers) >= len(calls):
        raise AdapterError(f"it has a prefix for layer {max(layers)}, but the model has {len(calls)} attention layers")
    for layer, shape in zip(layers, header.layer_shapes[: len(layers)], strict=True):
        if shape != calls[layer].shape:
            raise AdapterError(
                f"the prefix of layer {layer} is for {shape}, but the model has {calls[layer].shape}; it was trained "
                "for another model"
            )
