"""What a distillation cannot do."""

from __future__ import annotations


class DistillError(ValueError):
    """A text, prompts or a model that cannot be distilled; the message says why and what to do.

    Examples:
        >>> from prefixcore.distill import DistillError, DistillOptions, distill
        >>> try:
        ...     distill(model, tokenizer, "", options=DistillOptions(num_virtual_tokens=4))
        ... except DistillError as error:
        ...     print(error)
        the text has no token: give one with something in it
    """
