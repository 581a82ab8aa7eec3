"""Classifier-free guidance (`guidance_scale` of `generate`): its side without the prompt is without virtual tokens too.

As in PEFT, and as where a text stands in the place of the virtual tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

if TYPE_CHECKING:
    from .bank import Bank


class WithoutVirtualTokens:
    """The model of a bank, of which each call is one without what is attached."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._bank.disabled():
            return self._bank.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bank.model, name)


def guide_without(bank: Bank, processors: Any) -> Any:
    """The logits processors of a generate, of which those for guidance call the model without virtual tokens."""
    for processor in processors:
        if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) and processor.model is bank.model:
            processor.model = WithoutVirtualTokens(bank)
    return processors
