"""The one exception of reading and writing adapters."""

from __future__ import annotations


class AdapterError(ValueError):
    """An adapter can't be read, written or used with a model; the message names the file and the field.

    Examples:
        >>> try:
        ...     prefixcore.load(model, "nowhere")
        ... except prefixcore.AdapterError as error:
        ...     print(error)
        nowhere: no such folder
    """
