"""How a request names its adapter: vLLM's `cache_salt`, which also goes into the hash of the request's cache blocks.

`prefixcore:<name>@<digest>`, with the caller's own salt behind a colon where there is one. As the content digest is
part of it, blocks of two adapters, or of an adapter before and after it was replaced, never stand for each other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SCHEME = "prefixcore:"
PLACEHOLDER = 0
"""The token that a prompt begins with, once for each virtual token, unless the connector's settings name another."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FORBIDDEN = ("/", "\\", "@", "\0")


@dataclass(frozen=True)
class Salt:
    """What a `cache_salt` says.

    Attributes:
        name: the adapter's, which is its folder's name in the registry.
        digest: of its content, 64 hexadecimal digits.
        own: the caller's own salt, or None.
    """

    name: str
    digest: str
    own: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}@{self.digest}" + ("" if self.own is None else f":{self.own}")


def make_salt(name: str, digest: str, own: str | None = None) -> str:
    """The `cache_salt` of a request for an adapter.

    Args:
        name: the adapter's name in the registry.
        digest: of its content, 64 hexadecimal digits.
        own: the caller's own salt: requests with different ones share no cache blocks.

    Raises:
        ValueError: a name that is no folder's name or holds `@`, or something else than a digest.

    Examples:
        >>> from prefixcore.serving.salt import make_salt
        >>> make_salt("capitals", "0" * 64, "tenant 7")[-20:]
        '00000000000:tenant 7'
    """
    if not name or name in (".", "..") or not name.isprintable() or any(c in name for c in _FORBIDDEN):
        raise ValueError(f"an adapter's name is a folder's name without '@', got {name!r}")
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"a digest is 64 hexadecimal digits in lower case, got {digest!r}")
    return str(Salt(name, digest, own))


def parse_salt(salt: str | None) -> Salt | None:
    """The inverse of `make_salt`.

    Returns:
        None for a request that names no adapter: it has no salt, or one of another kind.

    Raises:
        ValueError: the salt begins as one of ours and does not name an adapter and a digest.

    Examples:
        >>> from prefixcore.serving.salt import parse_salt
        >>> parse_salt("prefixcore:capitals@" + "0" * 64).name
        'capitals'
        >>> parse_salt("tenant 7") is None
        True
    """
    if salt is None or not salt.startswith(SCHEME):
        return None
    name, at, rest = salt[len(SCHEME) :].partition("@")
    digest, colon, own = rest.partition(":")
    try:
        made = make_salt(name, digest, own if colon else None)
    except ValueError as error:
        raise ValueError(f"cache_salt: {error}; expected {SCHEME}NAME@DIGEST, got {salt[:200]!r}") from error
    if made != salt:
        raise ValueError(f"cache_salt: expected {SCHEME}NAME@DIGEST, got {salt[:200]!r}")
    return Salt(name, digest, own if colon else None)
