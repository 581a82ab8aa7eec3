"""What is known about an adapter, beside its values: the file `prefixcore_manifest.json`."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

from ..nn import (
    Config,
    CPTConfig,
    LayerShape,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
)
from ..version import __version__
from .digest import DIGEST, content_digest, is_sha256
from .errors import AdapterError, shown
from .fingerprint import check_fingerprint, fingerprint
from .provenance import FIELDS, check_provenance, now

FORMAT_VERSION = 2
"""What is written. Version 1, which prefixcore 0.1.0 wrote, has no digest and no provenance; it is read."""

READ_VERSIONS = (1, 2)
_CONFIGS: dict[str, type[Config]] = {
    config.method: config
    for config in (PrefixTuningConfig, PromptTuningConfig, PTuningConfig, MultitaskPromptTuningConfig, CPTConfig)
}
_TYPES: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "method": (str,),
    "config": (dict,),
    "base_model": (dict,),
    "libraries": (dict,),
    "peft_type": (str, type(None)),
    "files": (dict,),
    "task": (str, type(None)),
    "tokenizer": (dict, type(None)),
    "layers": (list, type(None)),
    "layer_shapes": (list, type(None)),
}
_SINCE_2 = (DIGEST, *FIELDS)
"""Fields that version 1 does not have."""


@dataclass(frozen=True)
class Manifest:
    """What is known about an adapter.

    Attributes:
        method: "prefix", "prompt", "p-tuning", "multitask-prompt" or "cpt".
        config: the fields of the configuration it was trained with; tensors given as `init` are not in it.
        base_model: the `fingerprint` of the model it was trained for.
        libraries: versions of what wrote it.
        task: in a person's words, what it does.
        tokenizer: class, name and vocabulary size of the tokenizer, if one was given.
        layers: of a prefix, the indices of the layers that have one.
        layer_shapes: of a prefix, `[Hkv, D, Dv]` of each of these layers.
        peft_type: PEFT's name of the method, if PEFT's files can express the adapter.
        files: size and SHA-256 of each other file that was written with it; in version 1 of the tensor files alone.
        hidden_size: E of a soft prompt that PEFT's files cannot express, because it stands in the text or before an
            encoder that multiplies embeddings of ids; None of any other adapter, whose file does not hold the field.
        date: when it was written, in UTC: "2026-01-31T12:00:00Z".
        license: what its author allows, best as an SPDX identifier.
        intended_use: what its author made it for, and what not.
        data: `sha256` of the training data as used (`prefixcore.training.describe_data`), and more that is said of it.
        metrics: numbers by their names, measured on examples that were held out.
        split: which those were: a name, a seed and a fraction, a digest.
        training: the settings of the training, by their names.
        seed: that of the training.
        derived_from: the adapters whose values the training went on from, the oldest first: digest, date, and the
            digest of their data.
        digest: what `adapter_digest` says; None in one that was not read from a file.
        format_version: of the file.

    `peft_type`, `files`, `hidden_size` and `digest` are filled in when the adapter is written.

    Examples:
        >>> from prefixcore.adapters import Manifest
        >>> config = prefixcore.PromptTuningConfig(num_virtual_tokens=4)
        >>> manifest = Manifest.create(model, config, task="country -> capital")
        >>> manifest.method, manifest.base_model["num_hidden_layers"]
        ('prompt', 2)
    """

    method: str
    config: dict[str, Any]
    base_model: dict[str, Any]
    libraries: dict[str, str]
    task: str | None = None
    tokenizer: dict[str, Any] | None = None
    layers: list[int] | None = None
    layer_shapes: list[list[int]] | None = None
    peft_type: str | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    hidden_size: int | None = None
    date: str | None = None
    license: str | None = None
    intended_use: str | None = None
    data: dict[str, Any] | None = None
    metrics: dict[str, Any] | None = None
    split: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    seed: int | None = None
    derived_from: list[dict[str, Any]] | None = None
    digest: str | None = field(default=None, compare=False)
    format_version: int = FORMAT_VERSION

    @classmethod
    def create(
        cls,
        model: nn.Module,
        config: Config,
        layer_shapes: Sequence[LayerShape] | None = None,
        *,
        task: str | None = None,
        tokenizer: Any = None,
        forced: Sequence[str] = (),
        base_model: Mapping[str, Any] | None = None,
        **provenance: Any,
    ) -> Manifest:
        """The manifest of an adapter for `model`.

        Args:
            model: the base model.
            config: what was trained.
            layer_shapes: of each layer with a prefix, in the model's order; None for a soft prompt.
            task: in a person's words, what the adapter does.
            tokenizer: a transformers tokenizer.
            forced: in what the model is not the one that the adapter came from, where someone has insisted on it.
            base_model: the fingerprint of the base model, where `model` is no longer whole; None: it is taken now.
            provenance: `license`, `intended_use`, `data`, `metrics`, `split`, `training`, `seed`, as the attributes.

        Raises:
            TypeError, ValueError: a task that is no text, or says nothing; layer shapes that do not fit `config`; a
                field of the provenance that is not what it stands for.
        """
        if not isinstance(task, (str, type(None))):
            raise TypeError(f"task: expected a text or None, got {type(task).__name__}")
        if task is not None and not task.strip():
            raise AdapterError(f"task: expected what it does, in words, or None, got {task[:40]!r}")
        if unknown := sorted(set(provenance) - (set(FIELDS) - {"date", "derived_from"})):
            raise TypeError(f"{unknown[0]}: no field of the manifest that can be given")
        check_provenance(provenance)
        given: dict[str, Any] = {n: dict(v) if isinstance(v, Mapping) else v for n, v in provenance.items()}
        prefix = isinstance(config, PrefixTuningConfig)
        if prefix != (layer_shapes is not None):
            raise ValueError("layer_shapes: expected for a prefix, and for nothing else")
        layers = None
        if isinstance(config, PrefixTuningConfig) and layer_shapes is not None:
            layers = config.layers or list(range(len(layer_shapes)))
            if len(layers) != len(layer_shapes):
                raise ValueError(f"layer_shapes: expected one for each of layers {layers}, got {len(layer_shapes)}")
        if base_model is None:
            base_model = fingerprint(model, config.head_names)
        return cls(
            method=config.method,
            config=config.to_dict(),
            base_model={**base_model, **({"forced": list(forced)} if forced else {})},
            libraries=_libraries(),
            task=task,
            tokenizer=None if tokenizer is None else _describe(tokenizer),
            layers=layers,
            layer_shapes=[list(dataclasses.astuple(s)) for s in layer_shapes] if layer_shapes else None,
            date=now(),
            **given,
        )

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the file, with the digest of these fields."""
        values = dataclasses.asdict(self)
        if self.hidden_size is None:
            del values["hidden_size"]
        if self.format_version == 1:
            return {name: value for name, value in values.items() if name not in _SINCE_2}
        return {**values, DIGEST: content_digest(values)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """The inverse of `to_dict`.

        Raises:
            AdapterError: naming a field that is missing, unknown, of a wrong type, or contradicts another.
        """
        version = values.get("format_version")
        if type(version) is not int or version not in READ_VERSIONS:
            raise AdapterError(
                f"format_version: expected {' or '.join(map(str, READ_VERSIONS))}, got {shown(version)}; read it with "
                "the version of prefixcore that wrote it"
            )
        since = _SINCE_2 if version >= 2 else ()
        for name, types in _TYPES.items():
            if name not in values:
                raise AdapterError(f"{name}: missing")
            if not isinstance(values[name], types):
                raise AdapterError(f"{name}: expected {types[0].__name__}, got {type(values[name]).__name__}")
        for name in since:
            if name not in values:
                raise AdapterError(f"{name}: missing")
        unknown = sorted(set(values) - {*_TYPES, "hidden_size", *since})
        if unknown:
            raise AdapterError(f"{unknown[0]}: unknown field")
        if "hidden_size" in values and not _positive(values["hidden_size"]):
            raise AdapterError(f"hidden_size: expected an integer of at least 1, got {shown(values['hidden_size'])}")
        check_fingerprint(values["base_model"])
        _check_facts("libraries", values["libraries"])
        _check_facts("tokenizer", values["tokenizer"] or {})
        check_provenance(values)
        if since and not is_sha256(values[DIGEST]):
            raise AdapterError(f"digest: expected a SHA-256 of 64 hex digits, got {shown(values[DIGEST])}")
        manifest = cls(**values)
        manifest._check_layers(manifest.make_config())
        return manifest

    def make_config(self) -> Config:
        """The configuration; `init` that was given as tensors is "tensor"."""
        if self.method not in _CONFIGS:
            raise AdapterError(f"method: expected one of {', '.join(_CONFIGS)}, got {shown(self.method)}")
        try:
            return _CONFIGS[self.method](**self.config)
        except (TypeError, ValueError) as error:
            raise AdapterError(f"config: {error}") from error

    def make_layer_shapes(self) -> list[LayerShape]:
        """The shape of each layer that has a prefix; none for a soft prompt."""
        return [LayerShape(*shape) for shape in self.layer_shapes or []]

    def _check_layers(self, config: Config) -> None:
        if not isinstance(config, PrefixTuningConfig):
            if self.layers is not None or self.layer_shapes is not None:
                raise AdapterError("layers: a soft prompt has none")
            return
        shapes, layers = self.layer_shapes, self.layers
        if not shapes or not all(isinstance(s, list) and len(s) == 3 and _positive(*s) for s in shapes):
            raise AdapterError(f"layer_shapes: expected [Hkv, D, Dv] for each layer with a prefix, got {shown(shapes)}")
        are_indices = all(type(layer) is int for layer in layers or [])  # 0.0 and False are equal to 0
        if not are_indices or layers != (config.layers or list(range(len(shapes)))) or len(layers) != len(shapes):
            raise AdapterError(f"layers: {shown(layers)} does not agree with config.layers and layer_shapes")


def _check_facts(name: str, facts: Mapping[str, Any]) -> None:
    """Raises AdapterError unless each of these facts is a text, an integer or None."""
    for field_name, value in facts.items():
        if not isinstance(value, (str, int, type(None))):
            raise AdapterError(f"{name}.{field_name}: expected a text or an integer, got {shown(value)}")


def _positive(*values: Any) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and 0 < v < 2**63 for v in values)


def _libraries() -> dict[str, str]:
    versions = {"prefixcore": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("transformers", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = _version(name)
    return versions


@cache
def _version(name: str) -> str:
    """That of an installed package, whose metadata takes a millisecond to parse."""
    return importlib.metadata.version(name)


def _describe(tokenizer: Any) -> dict[str, Any]:
    return {
        "class": type(tokenizer).__name__,
        "name_or_path": str(getattr(tokenizer, "name_or_path", None) or "") or None,
        "vocab_size": len(tokenizer) if hasattr(tokenizer, "__len__") else None,
    }
