"""The model that is served, and whether an adapter is for it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters import AdapterError
from ..adapters.fingerprint import config_facts
from ..adapters.header import AdapterHeader
from ..adapters.same_model import Comparison, find_differences
from ..adapters.samples import Sample
from ..nn import LayerShape
from .checkpoint import Checkpoint
from .families import why_no_images

logger = logging.getLogger("vllm.prefixcore")

_NOT_COUNTED = "num_parameters: not counted in a checkpoint"


@dataclass(frozen=True)
class ServedModel:
    """What is known of the model without loading it.

    Attributes:
        layers: the shape of each layer's keys and values, of the whole model.
        facts: the fields of a fingerprint that its configuration states.
        checkpoint: where its weights lie; None: in no safetensors files here, so that they are not compared.
        left_out: the fields that its configuration cannot say, and why.
        no_images: why images are not read behind a prefix; None: they are, where the model reads any.
    """

    layers: list[LayerShape]
    facts: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    left_out: Sequence[str] = ()
    no_images: str | None = None

    @classmethod
    def describe(cls, config: Any, layers: list[LayerShape], folder: Path | None) -> ServedModel:
        """The model of a transformers configuration and a checkpoint's folder.

        Args:
            config: the whole model's configuration, of which the text model's may be a part.
            layers: the shape of each layer.
            folder: of the checkpoint; None: there is none.
        """
        architectures = getattr(config, "architectures", None) or [None]
        left_out: list[str] = []
        facts = config_facts(config.get_text_config(), left_out)
        checkpoint = None
        try:
            checkpoint = Checkpoint(folder) if folder is not None else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("prefixcore: %s: the checkpoint cannot be read (%s)", folder, error)
        if not checkpoint:
            logger.warning(
                "prefixcore: the model's weights are in no safetensors files here: that an adapter was trained for "
                "this model is checked by its architecture alone"
            )
        no_images = why_no_images(getattr(config, "model_type", None))
        return cls(layers, {"class": architectures[0], **facts}, checkpoint or None, left_out, no_images)

    def check(self, header: AdapterHeader) -> None:
        """Raises AdapterError unless the adapter, a prefix, is for every layer of this model."""
        if header.heads:
            raise AdapterError(
                f"it brings modules along that were trained with it ({', '.join(sorted(header.heads))}), which vLLM "
                "cannot exchange from request to request"
            )
        if header.layers != list(range(len(self.layers))):
            raise AdapterError(
                f"it has a prefix for the layers {header.layers}, and the model has {len(self.layers)}: a layer "
                "without one would attend to the placeholders, so every layer needs one"
            )
        for layer, (shape, expected) in enumerate(zip(header.layer_shapes, self.layers, strict=True)):
            if shape != expected:
                raise AdapterError(f"the prefix of layer {layer} is for {shape}, but the model has {expected}")
        if header.base_model is not None:
            found = self.compare(header.base_model)
            if found.differences:
                raise AdapterError("; ".join(found.differences))
            if found.unchecked:
                logger.warning("prefixcore: %s", found.unchecked)

    def compare(self, expected: Mapping[str, Any]) -> Comparison:
        """In what this model differs from the one with the fingerprint `expected`: facts, and sampled weights.

        The numbers that the fingerprint holds are read from the checkpoint, and no others; so its digests, which are of
        other numbers, are not compared.
        """
        samples = {}
        for name, text in (expected.get("samples") or {}).items() if self.checkpoint is not None else ():
            sample = Sample.parse(text)
            if sample is not None and self.checkpoint is not None:
                found = self.checkpoint.sample(name, sample.numbers, sample.shape)
                if found is not None:
                    samples[name] = str(found)
        left_out = [_NOT_COUNTED, *self.left_out]
        actual = {**self.facts, "num_parameters": None, "weights": {}, "samples": samples, "left_out": left_out}
        return find_differences({"tables": [], **expected, "weights": {}}, actual)
