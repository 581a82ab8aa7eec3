"""Several documents' prefixes one behind the other, as one prefix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..adapters import Manifest, check_target, read_adapter, write_adapter
from ..hf.attaching import check_model
from ..hf.loading import Target
from ..hf.positions.rotary import turn
from ..nn import LayerShape, Prefix, PrefixTuningConfig
from .errors import DistillError


def compose(
    model: PreTrainedModel, adapters: Sequence[str | Path], directory: str | Path, *, task: str | None = None
) -> Path:
    """Writes the prefixes of several adapters one behind the other, as a prefix of all their virtual tokens.

    Each was trained alone, at positions 0 to P-1. The keys of the second one on are turned to the positions where they
    stand now; nothing is trained. What that does to the answers is to be measured: no prefix has learnt to share the
    attention of a prompt with another one.

    Args:
        model: the model that they were trained for, with nothing attached.
        adapters: folders of prefixes, in the order in which they are to stand.
        directory: the folder to write.
        task: what it does, in words.

    Returns:
        The folder.

    Raises:
        DistillError: fewer than two adapters, one that is no prefix, or prefixes of different layers.
        AdapterError: an adapter that cannot be read or is another model's, or keys that cannot be turned (learned
            positions).

    Examples:
        >>> from prefixcore.distill import compose
        >>> for name in ("rules", "prices"):
        ...     with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4)) as handle:
        ...         folder = handle.save(name)
        >>> with prefixcore.load(model, compose(model, ["rules", "prices"], "both")) as handle:
        ...     print(handle)
        Handle(prefix on LlamaForCausalLM, 8 virtual tokens, 0 trainable)
    """
    if len(adapters) < 2:
        raise DistillError(f"expected at least two adapters to put one behind the other, got {len(adapters)}")
    check_target(Path(directory).absolute())
    check_model(model)
    target = Target(model)
    pairs: list[list[tuple[Tensor, Tensor]]] = []
    layers: list[int] = []
    shapes: tuple[LayerShape, ...] = ()
    digests: list[str | None] = []
    before = 0
    for folder in map(Path, adapters):
        found = target.read(folder, trainable=False)
        if not isinstance(found.module, Prefix):
            raise DistillError(
                f"{folder}: is no prefix but a {found.module.config.method}; make it one first (prefixcore bake)"
            )
        if pairs and found.layers != layers:
            raise DistillError(f"{folder}: its layers are not those of {adapters[0]}, so the two cannot stand together")
        layers, shapes = found.layers, found.module.shapes
        own = [(key.cpu(), value.cpu()) for key, value in found.module.bake()]
        # Keys of a prefix that leaves the text at position 0 stand at -P to -1.
        by = before if found.module.config.position_offset else before + found.module.num_virtual_tokens
        pairs.append(turn(model, own, by, found.layers) if by else own)
        before += found.module.num_virtual_tokens
        digests.append(read_adapter(folder).digest)
    joined = [
        (torch.cat([key for key, _ in layer], 1), torch.cat([value for _, value in layer], 1))
        for layer in zip(*pairs, strict=True)
    ]
    every = layers == list(range(len(target.attention_layers[0])))
    config = PrefixTuningConfig(init=joined, layers=None if every else layers)
    module = Prefix(shapes, config, joined).requires_grad_(False)
    names = {f"composed_{number}": digest for number, digest in enumerate(digests, start=1)}
    manifest = Manifest.create(
        model, module.config, list(module.shapes), task=task, training={"method": "compose", **names}
    )
    return write_adapter(Path(directory), module=module, config=module.config, manifest=manifest)
