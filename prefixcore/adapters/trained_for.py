"""Which base model the values in PEFT's file are for, where no manifest stands beside it.

PEFT's configuration names a model and knows none of its weights. The header of a safetensors file has room for texts
that every reader passes over, so the fingerprint of the base model stands there in a file that we write for PEFT alone,
and the values are not taken for another model of the same shape when they come back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import AdapterError, shown
from .fingerprint import check_fingerprint
from .storage import naming

KEY = "prefixcore.base_model"


def with_base_model(data: bytes, base_model: Mapping[str, Any]) -> bytes:
    """A safetensors file's bytes with a fingerprint in its header; the tensors stay where they are in the data.

    Args:
        data: the file.
        base_model: the `fingerprint` of the model that the values are for.
    """
    size = int.from_bytes(data[:8], "little")
    fields = json.loads(data[8 : 8 + size])
    metadata = {**fields.pop("__metadata__", {}), KEY: json.dumps(base_model, sort_keys=True)}
    header = json.dumps({"__metadata__": metadata, **fields}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors begin at a multiple of eight bytes
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def read_base_model(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The fingerprint in a safetensors file's header; None: there is none.

    Raises:
        AdapterError: it is damaged.
    """
    text = metadata.get(KEY)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    with naming(path):
        if not isinstance(found, dict):
            raise AdapterError(f"{KEY} in its header: expected a fingerprint in JSON, got {shown(text)}")
        check_fingerprint(found)
    return found
