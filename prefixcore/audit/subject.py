"""What the adapter is, from its own files: the manifest, the record of its training, what PEFT wrote."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..adapters import Adapter, adapter_digest
from ..adapters.module import tensors_of
from .virtual import METHODS, VirtualTokens


def describe(folder: Path, adapter: Adapter, record: dict[str, Any], virtual: VirtualTokens) -> dict[str, Any]:
    """The facts that the page begins with; None where nobody has stated one.

    Everything but the shapes and the digest is what the adapter says of itself.
    """
    manifest = {} if adapter.manifest is None else adapter.manifest.to_dict()
    values = tensors_of(adapter.tensors)
    base = manifest.get("base_model") or {}
    stated = adapter.peft_config or {}
    config = {name: value for name, value in adapter.config.to_dict().items() if value is not None}
    return {
        "name": folder.resolve().name,
        "digest": adapter_digest(folder),
        "written_by": "PEFT" if not manifest else f"prefixcore {manifest['libraries'].get('prefixcore')}",
        "task": manifest.get("task"),
        "method": adapter.config.method,
        "kind": METHODS[adapter.config.method],
        "num_virtual_tokens": virtual.count,
        "numbers": sum(tensor.numel() for tensor in values),
        "layers": sorted(virtual.pairs) or None,
        "start": config.get("init"),
        "init_text": config.get("init_text"),
        "reparameterization": config.get("reparameterization") or config.get("encoder_reparameterization_type"),
        "base_model": base.get("name_or_path") or stated.get("base_model_name_or_path"),
        "base_class": base.get("class"),
        "base_parameters": base.get("num_parameters"),
        "forced": base.get("forced") or [],
        "license": manifest.get("license"),
        "intended_use": manifest.get("intended_use"),
        "data": manifest.get("data") or ({"file": record["data"]} if record.get("data") else None),
        "split": manifest.get("split") or record.get("split"),
        "stated_metrics": manifest.get("metrics") or record.get("held_out") or None,
        "training": manifest.get("training") or record.get("options"),
        "seed": manifest.get("seed"),
        "date": manifest.get("date"),
        "derived_from": manifest.get("derived_from"),
        "modules_trained_along": sorted(adapter.heads),
        "libraries": manifest.get("libraries"),
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()},
    }


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    value = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value.update(block)
    return value.hexdigest()
