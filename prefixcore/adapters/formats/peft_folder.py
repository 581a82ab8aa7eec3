"""PEFT's folder, which an adapter of ours is already, wherever PEFT can express it: here without our manifest."""

from __future__ import annotations

from pathlib import Path

import torch

from ...nn import MultitaskPrompt
from ..errors import AdapterError
from ..files import MODEL_FILE, PEFT_FILE
from ..module import Adapter, build_module
from ..reading import read_adapter, read_header
from ..trained_for import with_base_model
from .files import read_bytes
from .record import PREFIX, PROMPT, Contents, Facts, Written


class PeftFolder:
    """PREFIX_TUNING, CARTRIDGE, PROMPT_TUNING, P_TUNING, MULTITASK_PROMPT_TUNING and CPT, of PEFT 0.18 to 0.21."""

    name = "peft"
    title = "PEFT"
    kinds: tuple[str, ...] = (PREFIX, PROMPT)
    is_folder = True
    position_offset = True
    needs_model = False
    layout = "folder: adapter_config.json, adapter_model.safetensors with prompt_embeddings"
    lost = (
        "manifest (the base model's fingerprint goes along), record, reparameterization; refused: a prefix in some "
        "layers alone, one with position_offset=False, a soft prompt in the text or for scaled ids"
    )

    def read(self, source: Path, facts: Facts) -> Contents:
        """The virtual tokens of an adapter's folder, PEFT's or ours."""
        return contents_of(read_adapter(source), source)

    def write(self, contents: Contents, facts: Facts, dtype: torch.dtype) -> Written:
        """PEFT's two files of the adapter that `contents` was read from."""
        folder = contents.folder
        if folder is None:
            raise AdapterError("PEFT's files name a base model: convert to an adapter first (--from ... --model ...)")
        if dtype != torch.float32:
            raise AdapterError("PEFT's files are written in float32; leave --dtype out")
        if not (folder / PEFT_FILE).exists():
            raise AdapterError(
                f"{folder}: PEFT cannot hold it: a prefix in some layers alone, of several shapes or with "
                "position_offset=False (prefixcore bake makes an equal one of that), or a soft prompt that stands in "
                "the text, or before an encoder that multiplies embeddings of ids (scale_embedding)"
            )
        files = {name: read_bytes(folder / name) for name in (PEFT_FILE, MODEL_FILE)}
        header, _ = read_header(folder)
        # Version 0.1.0 counted the heads too, which nothing but its manifest tells.
        if header.base_model is not None and (header.manifest is None or "modules_to_save" in header.manifest.config):
            files[MODEL_FILE] = with_base_model(files[MODEL_FILE], header.base_model)
        return Written(files)


def contents_of(adapter: Adapter, folder: Path | None = None) -> Contents:
    """The virtual tokens of an adapter, whatever reparameterizes them."""
    config, tensors = adapter.config, adapter.tensors
    if not isinstance(tensors, torch.Tensor):
        every = adapter.manifest is None or getattr(config, "layers", None) is None
        return Contents(
            prefix=list(tensors),
            layers=None if every else adapter.layers,
            num_frozen_tokens=getattr(config, "num_frozen_tokens", 0),
            position_offset=getattr(config, "position_offset", True),
            folder=folder,
        )
    module = build_module(adapter, trainable=False, share=False)
    prompts = module.bake() if isinstance(module, MultitaskPrompt) else tensors[None]
    return Contents(prompts=prompts, folder=folder)
