"""The one exception of reading and writing adapters."""

from __future__ import annotations

_LONGEST = 120
_LONGEST_MESSAGE = 1500


class AdapterError(ValueError):
    """An adapter can't be read, written or used with a model; the message names the file and the field.

    What files and models say stands in it with every character that is not printable escaped, and cut where it is
    long, so that printing the message on a terminal prints text.

    Examples:
        >>> try:
        ...     prefixcore.load(model, "nowhere")
        ... except prefixcore.AdapterError as error:
        ...     print(error)
        nowhere: no such folder
    """

    def __init__(self, message: str) -> None:
        text = printable(message)
        super().__init__(text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}...")


def printable(text: str) -> str:
    """`text` with an escape in place of every character that is not printable: control characters, lone surrogates.

    Examples:
        >>> from prefixcore.adapters.errors import printable
        >>> print(printable("a\\x1b[2Jb"))
        a\\x1b[2Jb
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shown(value: object) -> str:
    """`repr(value)`, cut where it is long: for a message about a value from a file."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep; an integer of more digits than Python prints
        return f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"
