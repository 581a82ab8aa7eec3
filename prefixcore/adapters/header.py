"""What an adapter's folder claims, before any of its numbers is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..nn import Config, LayerShape
from .agreement import check_agreement, check_method
from .files import (
    MANIFEST_FILE,
    PEFT_FILE,
    tensor_shapes,
)
from .manifest import Manifest
from .peft import (
    PROMPT_EMBEDDINGS,
    from_peft,
    is_seq2seq,
    peft_tensor_shape,
    task_shapes,
)
from .storage import naming


@dataclass(frozen=True)
class AdapterHeader:
    """What an adapter's folder claims: its JSON files and the headers of its tensor files, which agree.

    Attributes:
        config, manifest, peft_config: as of `Adapter`.
        layers: of a prefix, the indices of the layers that have one; none for a soft prompt.
        layer_shapes: the shape of each of them.
        hidden_size: E of a soft prompt; None for a prefix.
        heads: the shapes of the tensors of `modules_to_save`, by their names in the model.
        base_model: the `fingerprint` of the model that it was trained for; None: no file of the folder knows it.
    """

    config: Config
    layers: list[int]
    layer_shapes: list[LayerShape]
    hidden_size: int | None
    manifest: Manifest | None
    peft_config: dict[str, Any] | None
    heads: dict[str, list[int]] = field(default_factory=dict)
    base_model: dict[str, Any] | None = None


Fits = Callable[[AdapterHeader], object]
"""Raises an exception if an adapter does not fit; called before any of its numbers is read."""


def claimed_shapes(folder: Path, manifest: Manifest | None, peft_config: dict[str, Any] | None) -> dict[str, list[int]]:
    """The names and shapes of the virtual tokens' tensors."""
    if peft_config is not None:
        with naming(folder / PEFT_FILE):
            shape = peft_tensor_shape(peft_config)
            return {PROMPT_EMBEDDINGS: shape, **task_shapes(peft_config)}
    assert manifest is not None
    tokens = manifest.make_config().num_virtual_tokens
    assert tokens is not None
    return tensor_shapes(manifest, tokens)


def claimed_config(folder: Path, manifest: Manifest | None, peft_config: dict[str, Any] | None) -> Config:
    """The configuration that the JSON files state, of which nothing large has been made."""
    if manifest is not None:
        with naming(folder / MANIFEST_FILE):
            return manifest.make_config()
    assert peft_config is not None
    with naming(folder / PEFT_FILE):
        return from_peft({**peft_config, "num_layers": 1})[0]


def header_of(folder: Path, manifest: Manifest | None, peft_config: dict[str, Any] | None) -> AdapterHeader:
    """What the JSON files say; AdapterError: they contradict each other."""
    hidden_size = None
    if peft_config is not None:
        with naming(folder / PEFT_FILE):
            config, layer_shapes = from_peft(peft_config)
        hidden_size = None if layer_shapes else peft_config["token_dim"]
    if manifest is not None:
        with naming(folder / MANIFEST_FILE):
            if peft_config is not None:
                if is_seq2seq(peft_config):
                    layer_shapes = layer_shapes[::2]  # as `for_seq2seq` has written them
                check_agreement(manifest, config, layer_shapes)
                check_method(manifest.make_config(), config)
            config, layer_shapes = manifest.make_config(), manifest.make_layer_shapes()
        if peft_config is None:
            hidden_size = manifest.hidden_size
    layers = list(range(len(layer_shapes))) if manifest is None or manifest.layers is None else manifest.layers
    base_model = None if manifest is None else manifest.base_model
    return AdapterHeader(config, layers, layer_shapes, hidden_size, manifest, peft_config, base_model=base_model)
