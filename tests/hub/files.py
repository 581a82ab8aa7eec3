"""The files of adapters, and which of them a Hub was asked for."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.hub.server import Files, Hub

MODEL, PEFT, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "prefixcore_manifest.json"


def files_of(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 12)[None]).logits


def served_files(hub: Hub) -> set[str]:
    """The names of the files whose contents were asked for."""
    return {line.rpartition("/")[2] for line in hub.asked if line.startswith("GET") and "/resolve/" in line}
