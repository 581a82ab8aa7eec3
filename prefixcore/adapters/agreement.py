"""Whether the JSON files of an adapter's folder agree with each other."""

from __future__ import annotations

from typing import Any

from ..nn import Config, CPTConfig, LayerShape, MultitaskPromptTuningConfig
from .digest import is_sha256
from .errors import AdapterError, shown
from .files import MODEL_FILE, PEFT_FILE, STATE_FILE
from .manifest import Manifest
from .peft_writing import is_expressible
from .record import CURVE, RECORD


def check_listing(manifest: Manifest, config: Config, peft_config: dict[str, Any] | None) -> None:
    """Raises AdapterError unless the manifest lists the files that an adapter with this configuration has."""
    if config.num_virtual_tokens is None:
        raise AdapterError("config.num_virtual_tokens: missing")
    expected = {MODEL_FILE, STATE_FILE} if config.is_reparameterized else {MODEL_FILE}
    extra = set()
    if manifest.format_version >= 2:  # version 1 lists the tensor files alone
        expected |= set() if peft_config is None else {PEFT_FILE}
        extra = {RECORD, CURVE}
    if manifest.files.keys() - extra != expected:
        raise AdapterError(f"files: expected {sorted(expected)}, got {shown(sorted(manifest.files))}")
    for name, described in manifest.files.items():
        if not is_description(described):
            raise AdapterError(f"files.{name}: expected bytes and sha256, got {shown(described)}")
    peft_type = None if peft_config is None else peft_config.get("peft_type")
    if peft_type != manifest.peft_type:
        raise AdapterError(f"peft_type: {shown(manifest.peft_type)}, but that of {PEFT_FILE} is {shown(peft_type)}")
    ours_alone = manifest.layers is None and not is_expressible(config, [], manifest.base_model)
    if ours_alone and peft_type is not None:
        in_text = "PEFT would put the soft prompt before the text, but it stands in the text (config.virtual_token_ids)"
        scaled = "PEFT would not multiply the embeddings of the text, but the model does (base_model.scales_ids)"
        why = scaled if is_expressible(config, [], {}) else in_text
        raise AdapterError(f"peft_type: expected none, got {shown(peft_type)}: {why}")
    if manifest.layers is None and not ours_alone and peft_type is None:
        raise AdapterError("peft_type: expected one: PEFT's files can hold this soft prompt, and so they do")
    if ours_alone != (manifest.hidden_size is not None):
        expected_size = "E, an integer of at least 1" if ours_alone else "none: PEFT's files say it"
        raise AdapterError(f"hidden_size: expected {expected_size}, got {shown(manifest.hidden_size)}")


def is_description(value: Any) -> bool:
    """Whether it says the size and the SHA-256 of a file."""
    if not isinstance(value, dict) or value.keys() != {"bytes", "sha256"}:
        return False
    return type(value["bytes"]) is int and value["bytes"] >= 0 and is_sha256(value["sha256"])


def check_method(ours: Config, peft: Config) -> None:
    """Raises AdapterError unless both are, or neither is, of the same tasks or of the same examples."""
    for kind, names in (
        (MultitaskPromptTuningConfig, ("num_tasks", "num_ranks")),
        (CPTConfig, ("cpt_token_ids", "cpt_tokens_type_mask")),
    ):
        if isinstance(ours, kind) != isinstance(peft, kind):
            raise AdapterError(f"method: {ours.method!r} does not agree with {PEFT_FILE}, {peft.method!r}")
        for name in names if isinstance(ours, kind) else ():
            if getattr(ours, name) != getattr(peft, name):
                raise AdapterError(f"config.{name}: does not agree with {PEFT_FILE}")


def check_agreement(manifest: Manifest, peft: Config, peft_shapes: list[LayerShape]) -> None:
    """Raises AdapterError unless the manifest states the shapes that PEFT's configuration states."""
    tokens, shapes = manifest.make_config().num_virtual_tokens, manifest.make_layer_shapes()
    if not peft_shapes:
        if shapes or peft.num_virtual_tokens != tokens:
            raise AdapterError(
                f"method {manifest.method!r} with {tokens} virtual tokens does not agree with {PEFT_FILE}, a soft "
                f"prompt of {peft.num_virtual_tokens}"
            )
    elif (shapes, tokens) != (peft_shapes, peft.num_virtual_tokens):
        raise AdapterError(
            f"layer_shapes with {tokens} virtual tokens do not agree with {MODEL_FILE}: by {PEFT_FILE} it has "
            f"{len(peft_shapes)} layers of {peft_shapes[0]} with {peft.num_virtual_tokens} virtual tokens"
        )
