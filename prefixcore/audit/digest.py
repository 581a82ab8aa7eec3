"""A digest of an adapter's folder, until `prefixcore.adapters` has one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def adapter_digest(folder: Path) -> str:
    """64 hex digits: SHA-256 over the names and the SHA-256 of the folder's files."""
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
