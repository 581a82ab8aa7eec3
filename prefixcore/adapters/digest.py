"""One digest of all that an adapter is: what names it in a registry, and what a server is asked for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from .errors import AdapterError, shown

DIGEST = "digest"
"""The field of the manifest that holds it."""

_HEX = re.compile(r"[0-9a-f]{64}")


def is_sha256(value: Any) -> bool:
    """Whether it is a SHA-256 as it is written everywhere here: 64 lower-case hex digits."""
    return isinstance(value, str) and _HEX.fullmatch(value) is not None


def content_digest(fields: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest's fields, all but `digest` itself, as canonical JSON.

    Canonical: keys in order, no white space, everything beyond ASCII escaped, numbers as Python writes them. The
    manifest holds the SHA-256 of the other files, so this covers them.
    """
    content = {name: value for name, value in fields.items() if name != DIGEST}
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    except RecursionError:
        raise AdapterError("nested too deep") from None
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def check_content(fields: Mapping[str, Any]) -> None:
    """Raises AdapterError unless the fields of a manifest have the digest that stands among them."""
    stated, found = fields.get(DIGEST), content_digest(fields)
    if stated != found:
        raise AdapterError(
            f"digest: {shown(stated)}, but that of these fields is {found}: a field was changed after the adapter was "
            "written; save it again with prefixcore, or get it again from whoever made it"
        )
