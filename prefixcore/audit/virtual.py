"""The virtual tokens of an adapter as plain tensors, whole or with one of them taken out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters import Adapter
from .errors import AuditError

METHODS = {"prefix": "prefix", "prompt": "soft prompt", "p-tuning": "soft prompt (P-tuning)"}
"""What can be audited, and what it is called on the page."""


@dataclass(frozen=True)
class VirtualTokens:
    """Baked virtual tokens: a prefix or a soft prompt.

    Attributes:
        count: P of the adapter, also where one has been taken out.
        places: the positions of those that are there; all, or all but one.
        pairs: of a prefix, by layer: key [Hkv, P, D] and value [Hkv, P, Dv].
        prompt: of a soft prompt, the embeddings [P, E].
        position_offset: whether the text begins at position P, `count`; else at 0.
    """

    count: int
    places: tuple[int, ...]
    pairs: dict[int, tuple[Tensor, Tensor]]
    prompt: Tensor | None = None
    position_offset: bool = True

    @property
    def text_position(self) -> int:
        """The position of the first token of the text."""
        return self.count if self.position_offset else 0

    @property
    def is_prefix(self) -> bool:
        return self.prompt is None

    def without(self, place: int) -> VirtualTokens:
        """The same with the virtual token at `place` taken out; the others, and the text, stay where they are."""
        kept = [i for i in range(len(self.places)) if self.places[i] != place]
        index = torch.tensor(kept, dtype=torch.long)

        def take(x: Tensor, dim: int) -> Tensor:
            return x.index_select(dim, index.to(x.device))

        return VirtualTokens(
            self.count,
            tuple(self.places[i] for i in kept),
            {layer: (take(key, 1), take(value, 1)) for layer, (key, value) in self.pairs.items()},
            None if self.prompt is None else take(self.prompt, 0),
            self.position_offset,
        )


def virtual_tokens(adapter: Adapter, device: torch.device | str = "cpu") -> VirtualTokens:
    """Those of an adapter, on a device.

    Raises:
        AuditError: a method whose virtual tokens are not one prefix, or one soft prompt before the text.
    """
    check_method(adapter)
    tensors = adapter.tensors
    if isinstance(tensors, Tensor):
        return VirtualTokens(len(tensors), tuple(range(len(tensors))), {}, tensors.to(device))
    pairs = {
        layer: (key.to(device), value.to(device)) for layer, (key, value) in zip(adapter.layers, tensors, strict=True)
    }
    count = tensors[0][0].shape[1]
    position_offset = getattr(adapter.config, "position_offset", True)
    return VirtualTokens(count, tuple(range(count)), pairs, position_offset=position_offset)


def check_method(adapter: Adapter) -> None:
    """Raises AuditError unless an audit knows what this method's virtual tokens are."""
    method = adapter.config.method
    if method not in METHODS:
        raise AuditError(
            f"the adapter's method is {method}; an audit is for one task's virtual tokens: {named(METHODS)}"
        )
    if getattr(adapter.config, "virtual_token_ids", None) is not None:
        raise AuditError(
            "the soft prompt stands within the text (virtual_token_ids), so no probe is complete without its "
            "placeholders; an audit is for virtual tokens before the text"
        )


def named(names: Sequence[str] | dict[str, str]) -> str:
    """Names in a sentence: `a, b or c`."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
