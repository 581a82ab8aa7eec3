"""Put an adapter's digests right after a test has changed it: what is left is what no digest can show."""

from __future__ import annotations

import json
from pathlib import Path

from prefixcore.adapters.digest import content_digest
from prefixcore.adapters.files import MANIFEST_FILE
from prefixcore.adapters.storage import describe


def redigest(folder: Path, *, files: bool = True) -> Path:
    """Writes the manifest anew, with the digest of its fields, and with those of the files unless `files` is False."""
    path = folder / MANIFEST_FILE
    fields = json.loads(path.read_text())
    if files:
        fields["files"] = {name: describe((folder / name).read_bytes()) for name in fields["files"]}
    if "digest" in fields:
        fields["digest"] = content_digest(fields)
    path.write_text(json.dumps(fields))
    return folder
