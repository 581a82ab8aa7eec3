"""A model folder and a registry for the tests of the parts that need no vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import prefixcore
from prefixcore.adapters import adapter_digest
from prefixcore.nn import LayerShape
from prefixcore.serving.served_model import ServedModel
from tests import tiny

SHAPES = [LayerShape(2, 16, 16)] * 2


def served(path: Path, model: Any) -> ServedModel:
    """The model, saved in `path`, as the connector sees it."""
    model.save_pretrained(path)
    return ServedModel.describe(model.config, SHAPES, path)


def add(registry: Path, name: str, model: Any, tokens: int = 5, **config: Any) -> str:
    """A random prefix in the registry; its digest."""
    config = {"num_virtual_tokens": tokens, "init": "random", **config}
    with prefixcore.attach(model, prefixcore.PrefixTuningConfig(**config)) as handle:
        handle.save(registry / name)
    return adapter_digest(registry / name)


def make(path: Path) -> tuple[Any, Path, ServedModel]:
    """The tiny model, an empty registry, and the model as it is served."""
    model, registry = tiny.model(), path / "adapters"
    registry.mkdir()
    return model, registry, served(path / "model", model)
