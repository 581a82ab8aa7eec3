"""Text of files, prompts and models, as it may be shown to a person."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    r"""`text` with an escape in place of every character that a terminal would obey or hide, lone surrogates included.

    Args:
        text: from anywhere.
        keep: characters that stay, line breaks say, though they are not printable.

    Examples:
        >>> from prefixcore._text import printable
        >>> print(printable("a\x1b[2Jb\n"), printable("a\nb", keep="\n"))
        a\x1b[2Jb\n a
        b
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)
