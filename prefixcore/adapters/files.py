"""The files in an adapter's folder, and the tensors in them.

- `adapter_model.safetensors`: the baked virtual tokens, as PEFT stores them where PEFT can express them, else
  `layers.N.key` [Hkv, P, D] and `layers.N.value` [Hkv, P, Dv] for each layer N that has a prefix, or
  `prompt_embeddings` [P, E] of a soft prompt;
- `adapter_config.json`: PEFT's configuration; absent where PEFT can't express the adapter;
- `prefixcore_manifest.json`: our manifest; absent in an adapter that PEFT wrote;
- `training_state.safetensors`: what a reparameterised prefix or soft prompt is trained by; absent otherwise;
- `model.sig`: a signature of all the others, if somebody has signed them (`signing`);
- `training.json` and `curve.png`: how it was trained (`record`), where whoever saves it says so.
"""

from __future__ import annotations

import os
from pathlib import Path

from .manifest import Manifest
from .peft import PROMPT_EMBEDDINGS
from .storage import check_path

MODEL_FILE = "adapter_model.safetensors"
PEFT_FILE = "adapter_config.json"
MANIFEST_FILE = "prefixcore_manifest.json"
STATE_FILE = "training_state.safetensors"
SIGNATURE_FILE = "model.sig"
CHECKPOINT = "prefixcore"
"""The folder in a checkpoint of Trainer's, or in what `save_pretrained` wrote, that holds the adapter."""

BESIDE_PEFT = "virtual_tokens"
"""The folder in `CHECKPOINT` that holds the adapter where PEFT's own (a LoRA) is in the checkpoint.

Trainer takes every folder of the checkpoint that holds an `adapter_model.safetensors` for one of PEFT's adapters.
"""


def find_adapter(folder: Path) -> Path:
    """The adapter's folder: the one given, or the one in it where that is a checkpoint."""
    check_path(folder)
    inside = folder / CHECKPOINT
    places = (folder, inside / BESIDE_PEFT, inside)  # in a checkpoint, PEFT's file right in the folder is a LoRA's
    return next((place for place in places if os.path.lexists(place / MANIFEST_FILE)), folder)


def tensor_names(manifest: Manifest) -> list[tuple[str, str]]:
    """Our own names of a prefix's tensors, one (key, value) a layer."""
    return [(f"layers.{layer}.key", f"layers.{layer}.value") for layer in manifest.layers or []]


def tensor_shapes(manifest: Manifest, tokens: int) -> dict[str, list[int]]:
    """The shape of each tensor by its name; `tokens` is P."""
    if manifest.hidden_size is not None:
        return {PROMPT_EMBEDDINGS: [tokens, manifest.hidden_size]}
    shapes = {}
    for (key, value), shape in zip(tensor_names(manifest), manifest.make_layer_shapes(), strict=True):
        shapes[key] = [shape.num_kv_heads, tokens, shape.key_dim]
        shapes[value] = [shape.num_kv_heads, tokens, shape.value_dim]
    return shapes
