"""Where the virtual tokens of a soft prompt stand in a batch: [padding][prompt][text], and text right-padded as it is.

A row's prompt stands directly before its text, also where the row is padded on the left: a prompt that stood before
the padding, as PEFT puts it, would be cut off from the text that it prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How B rows of T tokens become rows of P + T.

    Attributes:
        rows, length, virtual: B, T, P.
        lead: [B, 1], how many padding tokens come before each row's prompt; None: none in any row.
    """

    rows: int
    length: int
    virtual: int
    lead: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor | None, rows: int, length: int, virtual: int) -> Layout:
        """From a padding mask [B, T] (None: no padding). A row of nothing but padding gets its prompt at the end."""
        if mask is None or length == 0 or bool(mask[:, 0].all()):
            return cls(rows, length, virtual)
        lead = (mask.bool().cumsum(1) == 0).sum(1, keepdim=True)
        return cls(rows, length, virtual, lead)

    def insert(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        """`prompt` [B, P, ...] put into `tokens` [B, T, ...]: [B, P + T, ...]."""
        joined = torch.cat((prompt, tokens), 1)
        if self.lead is None:
            return joined
        at = torch.arange(self.virtual + self.length, device=tokens.device)
        lead = self.lead.to(tokens.device)
        # Row b of the result reads `joined` at: its padding, then the prompt, then the rest.
        source = torch.where(at < lead, at + self.virtual, torch.where(at < lead + self.virtual, at - lead, at))
        return _take(joined, source)

    def fill(self, tokens: Tensor, value: int) -> Tensor:
        """`insert` of one value for every virtual token."""
        return self.insert(tokens, tokens.new_full((tokens.shape[0], self.virtual, *tokens.shape[2:]), value))

    def cut(self, x: Tensor) -> Tensor:
        """The rows of `x` [B, P + T, ...] that belong to the caller's own tokens: [B, T, ...]."""
        if self.lead is None:
            return x[:, self.virtual :]
        at = torch.arange(self.length, device=x.device)
        return _take(x, torch.where(at < self.lead.to(x.device), at, at + self.virtual))

    def first(self, x: Tensor) -> Tensor:
        """What `x` [B, T] holds at each row's first token after its padding: [B, 1]."""
        if self.lead is None:
            return x[:, :1]
        return x.gather(1, self.lead.to(x.device).clamp(max=self.length - 1))


def _take(x: Tensor, index: Tensor) -> Tensor:
    """`x[b, index[b, i]]` for `x` [B, N, ...] and `index` [B, M]: [B, M, ...]."""
    index = index.view(*index.shape, *(1 for _ in x.shape[2:])).expand(*index.shape, *x.shape[2:])
    return x.gather(1, index)
