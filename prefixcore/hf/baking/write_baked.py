"""The plain prefix that was baked, as a module and as an adapter's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...adapters import Manifest, write_adapter
from ...adapters.provenance import MEASURED_FIELDS
from ...nn import LayerShape, Prefix, PrefixTuningConfig
from ..handle import Handle
from .bake_check import Comparison
from .source import Source

_HOLDS = ("model", "data", "end", "split", "held_out")
"""What a record says that is as true of an equal prefix."""


def plain_prefix(source: Source, num_layers: int, position_offset: bool) -> Prefix:
    """The prefix to write, of whose layers the model has `num_layers`."""
    config = source.config
    shapes = [LayerShape(key.shape[0], key.shape[2], value.shape[2]) for key, value in source.pairs]
    plain = PrefixTuningConfig(
        init=source.pairs,
        layers=None if source.layers == list(range(num_layers)) else source.layers,
        task_type="CAUSAL_LM" if config is None else config.task_type,
        tokenizer_name_or_path=None if config is None else config.tokenizer_name_or_path,
        modules_to_save=None if config is None else config.modules_to_save,
        position_offset=position_offset,
    )
    return Prefix(shapes, plain, source.pairs).requires_grad_(False)


def write_baked(
    directory: str | Path,
    handle: Handle,
    module: Prefix,
    source: Source,
    comparison: Comparison,
    author: Mapping[str, Any],
    tokenizer: Any,
) -> Path:
    """Writes the prefix, with what still holds of what it was baked from."""
    before = source.manifest
    facts = {
        **source.facts,
        "dtype": str(handle.model.dtype).removeprefix("torch."),
        "largest_difference": comparison.largest_difference,
        "inputs": comparison.num_inputs,
    }
    # What was measured is as true of an equal prefix: on the same model, and of one task.
    holds = before is not None and not handle.forced and "task_id" not in source.facts
    measured = {name: getattr(before, name) for name in MEASURED_FIELDS} if holds else {}
    told = {f"baked_{name}": value for name, value in facts.items() if name != "text"}
    measured["training"] = {**(measured.get("training") or {}), **told}
    manifest = Manifest.create(
        handle.model,
        module.config,
        list(module.shapes),
        tokenizer=tokenizer,
        forced=handle.forced,
        **measured,
        **author,
    )
    if tokenizer is None and before is not None:
        manifest = replace(manifest, tokenizer=before.tokenizer)
    kept = _HOLDS if holds else ("end",)
    record: Mapping[str, Any] = {
        **{name: source.record[name] for name in kept if name in source.record},
        "baked_from": facts,
    }
    return write_adapter(
        directory,
        module=module,
        config=module.config,
        manifest=manifest,
        heads=handle.heads.trained,
        record=record,
        source=before,
    )
