"""The one exception of reading and writing adapters."""

from __future__ import annotations

from .._text import printable

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


def shown(value: object) -> str:
    """`repr(value)`, cut where it is long: for a message about a value from a file."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep; an integer of more digits than Python prints
        return f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"
