"""How a request names its adapter: vLLM's `cache_salt`, which also goes into the hash of the request's cache blocks.

`prefixcore:<name>:<digest>`, with the caller's own salt behind another colon where there is one. As the content digest
is part of it, blocks of two adapters, or of an adapter before and after it was replaced, never stand for each other.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

SCHEME = "prefixcore:"
PLACEHOLDER = 0
"""The token that a prompt begins with, once for each virtual token, unless the connector's settings name another."""

LONGEST_SALT = 128
"""Characters: vLLM's HTTP server refuses a longer salt, and one with any of `@ / \\` or NUL in it."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_REFUSED = frozenset("@/\\\0")
LONGEST_NAME = LONGEST_SALT - len(SCHEME) - len(":") - 64
_HASHED = 16
"""Hexadecimal digits that stand for a caller's own salt which does not fit as it is."""


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
        return f"{SCHEME}{self.name}:{self.digest}" + ("" if self.own is None else f":{self.own}")


def make_salt(name: str, digest: str, own: str | None = None) -> str:
    """The `cache_salt` of a request for an adapter.

    Args:
        name: the adapter's name in the registry.
        digest: of its content, 64 hexadecimal digits.
        own: the caller's own salt: requests with different ones share no cache blocks. One that vLLM would refuse
            (too long in all, or with a character that it does not take) is replaced by a digest of it.

    Raises:
        ValueError: a name that cannot stand in a salt (empty, longer than 52 characters, with a colon or a character
            that vLLM refuses), or something else than a digest.

    Examples:
        >>> from prefixcore.serving.salt import make_salt
        >>> make_salt("capitals", "0" * 64, "tenant 7")[-20:]
        '00000000000:tenant 7'
    """
    if not name or name in (".", "..") or not name.isprintable() or _REFUSED & set(name) or ":" in name:
        raise ValueError(f"an adapter's name is a folder's name without ':' and '@', got {name[:LONGEST_SALT]!r}")
    if len(name) > LONGEST_NAME:
        raise ValueError(f"an adapter that is served has a name of at most {LONGEST_NAME} characters, got {name!r}")
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"a digest is 64 hexadecimal digits in lower case, got {digest[:LONGEST_SALT]!r}")
    if own is None:
        return str(Salt(name, digest))
    room = LONGEST_NAME - len(name) - len(":")
    if len(own) <= room and own and not _REFUSED & set(own):
        return str(Salt(name, digest, own))
    if room < _HASHED:
        raise ValueError(
            f"a request with a salt of its own needs an adapter's name of at most {LONGEST_NAME - 1 - _HASHED} "
            f"characters, got {name!r}"
        )
    hashed = hashlib.sha256(own.encode(errors="surrogatepass")).hexdigest()
    return str(Salt(name, digest, hashed[:_HASHED]))


def parse_salt(salt: str | None) -> Salt | None:
    """The inverse of `make_salt`.

    Returns:
        None for a request that names no adapter: it has no salt, or one of another kind.

    Raises:
        ValueError: the salt begins as one of ours and does not name an adapter and a digest.

    Examples:
        >>> from prefixcore.serving.salt import parse_salt
        >>> parse_salt("prefixcore:capitals:" + "0" * 64).name
        'capitals'
        >>> parse_salt("tenant 7") is None
        True
    """
    if salt is None or not salt.startswith(SCHEME):
        return None
    name, _, rest = salt[len(SCHEME) :].partition(":")
    digest, colon, own = rest.partition(":")
    try:
        make_salt(name, digest)
    except ValueError as error:
        raise ValueError(f"cache_salt: expected {SCHEME}NAME:DIGEST, got {salt[:LONGEST_SALT]!r}: {error}") from error
    return Salt(name, digest, own if colon else None)
