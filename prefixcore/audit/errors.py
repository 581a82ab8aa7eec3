"""What an audit cannot do."""

from __future__ import annotations


class AuditError(ValueError):
    """An adapter, a model or probes that cannot be audited; the message says why and what to do.

    Examples:
        >>> from prefixcore.audit import AuditError, audit
        >>> try:
        ...     audit(model, tokenizer, "nowhere", [])
        ... except AuditError as error:
        ...     print(error)
        there is no probe: an audit needs at least one prompt with its completion
    """


class NotMeasuredError(Exception):
    """One measure does not exist for this adapter or model; the message is the reason that the page gives."""
