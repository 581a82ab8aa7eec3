"""Several documents' prefixes one behind the other, as one prefix."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..adapters import Manifest, check_target, read_adapter, read_record, write_adapter
from ..adapters.writing import check_apart
from ..hf.attaching import check_model
from ..hf.loading import Found, Target
from ..hf.positions.rotary import turn
from ..nn import Prefix, PrefixTuningConfig
from .checks import positions_of
from .errors import DistillError

_ASKED = {"chat": False, "end": None}
"""What a record says of how prompts are asked, and what holds where it says nothing."""


def compose(
    model: PreTrainedModel,
    adapters: Sequence[str | Path],
    directory: str | Path,
    *,
    task: str | None = None,
    license: str | None = None,
    intended_use: str | None = None,
) -> Path:
    """Writes the prefixes of several adapters one behind the other, as a prefix of all their virtual tokens.

    Each was trained alone, at positions 0 to P-1. The keys of the second one on are turned to the positions where they
    stand now; nothing is trained. What that does to the answers is to be measured: no prefix has learnt to share the
    attention of a prompt with another one. Prompts are asked (`chat`, `end`) as those of the last, which stands next to
    them.

    Args:
        model: the model that they were trained for, with nothing attached.
        adapters: folders of prefixes, in the order in which they are to stand.
        directory: the folder to write.
        task: what it does, in words.
        license: what others may do with it, best as an SPDX identifier; no adapter's is taken over.
        intended_use: what it was made for, and what not.

    Returns:
        The folder.

    Raises:
        DistillError: fewer than two adapters, one that is no prefix or brings modules along, prefixes of different
            layers, or more virtual tokens in all than the model has positions for.
        AdapterError: an adapter that cannot be read or is another model's, or that would be replaced by what is made
            of it; keys that cannot be turned (learned positions).
        TypeError: one folder in place of several.

    Examples:
        >>> from prefixcore.distill import compose
        >>> for name in ("rules", "prices"):
        ...     with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4)) as handle:
        ...         folder = handle.save(name)
        >>> with prefixcore.load(model, compose(model, ["rules", "prices"], "both")) as handle:
        ...     print(handle)
        Handle(prefix on LlamaForCausalLM, 8 virtual tokens, 0 trainable)
    """
    if isinstance(adapters, (str, Path)):
        raise TypeError(f"adapters: expected a list of folders, got one: {str(adapters)!r}")
    if len(adapters) < 2:
        raise DistillError(f"expected at least two adapters to put one behind the other, got {len(adapters)}")
    check_target(Path(directory).absolute())
    for folder in adapters:
        check_apart(Path(folder), Path(directory))
    check_model(model)
    target, most = Target(model), positions_of(model)
    parts: list[_Part] = []
    pairs: list[list[tuple[Tensor, Tensor]]] = []
    before = 0
    for folder in map(Path, adapters):
        parts.append(part := _Part.read(target, folder))
        if part.found.layers != parts[0].found.layers:
            raise DistillError(f"{folder}: its layers are not those of {adapters[0]}, so the two cannot stand together")
        own = [(key.cpu(), value.cpu()) for key, value in part.prefix.bake()]
        # Keys of a prefix that leaves the text at position 0 stand at -P to -1.
        by = before if part.prefix.config.position_offset else before + part.prefix.num_virtual_tokens
        pairs.append(turn(model, own, by, part.found.layers) if by else own)
        before += part.prefix.num_virtual_tokens
        if most is not None and before >= most:
            raise DistillError(
                f"{folder}: with it there are {before:,} virtual tokens, which leave no room for a prompt in the "
                f"model's {most:,} positions; put fewer together"
            )
    asked = parts[-1].asked
    if any(part.asked != asked for part in parts):
        warnings.warn(
            "the adapters are for prompts that are asked in different ways "
            f"({', '.join(str(part.asked) for part in parts)}); behind all of them they are asked as of the last",
            stacklevel=2,
        )
    joined = [
        (torch.cat([key for key, _ in layer], 1), torch.cat([value for _, value in layer], 1))
        for layer in zip(*pairs, strict=True)
    ]
    layers, shapes = parts[0].found.layers, parts[0].prefix.shapes
    every = layers == list(range(len(target.attention_layers[0])))
    config = PrefixTuningConfig(init=joined, layers=None if every else layers)
    module = Prefix(shapes, config, joined).requires_grad_(False)
    names = {f"composed_{number}": part.lineage[-1]["digest"] for number, part in enumerate(parts, start=1)}
    manifest = Manifest.create(
        model,
        module.config,
        list(module.shapes),
        task=task,
        license=license,
        intended_use=intended_use,
        forced=tuple(dict.fromkeys(what for part in parts for what in part.found.forced)),
        training={"method": "compose", **names},
    )
    manifest = replace(manifest, derived_from=[parent for part in parts for parent in part.lineage])
    record = {**asked, "composed": names}
    return write_adapter(Path(directory), module=module, config=module.config, manifest=manifest, record=record)


class _Part(NamedTuple):
    """One of the prefixes.

    Attributes:
        found: what its folder holds.
        prefix: of it.
        lineage: the adapters that it comes from, as manifests name them, and last itself.
        asked: how its prompts are asked.
    """

    found: Found
    prefix: Prefix
    lineage: list[dict[str, Any]]
    asked: dict[str, Any]

    @classmethod
    def read(cls, target: Target, folder: Path) -> _Part:
        """The prefix in `folder`, which can stand beside another."""
        found = target.read(folder, trainable=False)
        if not isinstance(found.module, Prefix):
            raise DistillError(
                f"{folder}: is no prefix but a {found.module.config.method}; make it one first (prefixcore bake)"
            )
        if found.heads:
            raise DistillError(
                f"{folder}: brings modules along that were trained with it ({', '.join(found.heads)}), and a model has "
                "one of each, where every prefix expects its own"
            )
        record, source = read_record(folder), found.manifest
        data = None if source is None or source.data is None else source.data["sha256"]
        date, earlier = (None, []) if source is None else (source.date, source.derived_from or [])
        itself = {"digest": read_adapter(folder).digest, "date": date, "data": data}
        asked = {name: record.get(name, usual) for name, usual in _ASKED.items()}
        return cls(found, found.module, [*earlier, itself], asked)
