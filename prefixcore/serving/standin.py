"""Until `prefixcore.adapters.adapter_digest` is there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..adapters.errors import AdapterError
from ..adapters.files import MANIFEST_FILE, MODEL_FILE, PEFT_FILE


def adapter_digest(directory: str | Path) -> str:
    """64 hexadecimal digits that name an adapter's content."""
    folder = Path(directory)
    try:
        if (folder / MANIFEST_FILE).exists():
            fields = json.loads((folder / MANIFEST_FILE).read_bytes())
            fields.pop("digest", None)
            return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        digest = hashlib.sha256()
        for name in (PEFT_FILE, MODEL_FILE):
            digest.update((folder / name).read_bytes())
        return digest.hexdigest()
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder}: cannot be read: {error}") from error
