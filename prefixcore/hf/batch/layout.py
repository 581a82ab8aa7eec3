"""Where the virtual tokens of a soft prompt stand in a batch: [left padding][prompt][text][right padding].

The prompt stands directly before the text, also in a batch row that is padded on the left. PEFT puts it before the
padding, which then separates the prompt from the text that it is to prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How B batch rows of T tokens become batch rows of P + T.

    Attributes:
        batch_size: B.
        length: T.
        num_virtual_tokens: P.
        left_padding: int64 [B, 1], how many padding tokens come before the prompt; None: no batch row has any.
    """

    batch_size: int
    length: int
    num_virtual_tokens: int
    left_padding: Tensor | None = None

    @classmethod
    def from_mask(cls, mask: Tensor | None, batch_size: int, length: int, num_virtual_tokens: int) -> Layout:
        """The layout for a padding mask [B, T]; None: no padding. All padding counts as left padding."""
        # Compiled code cannot read values, and counts padding that may not be there.
        if mask is None or length == 0 or (not torch.compiler.is_compiling() and bool(mask[:, 0].all())):
            return cls(batch_size, length, num_virtual_tokens)
        left_padding = (mask.bool().cumsum(1) == 0).sum(1, keepdim=True)
        return cls(batch_size, length, num_virtual_tokens, left_padding)

    def insert(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        """`prompt` [B, P, ...] put into `tokens` [B, T, ...]: [B, P + T, ...]."""
        prepended = torch.cat((prompt, tokens), 1)
        if self.left_padding is None:
            return prepended
        i = torch.arange(self.num_virtual_tokens + self.length, device=tokens.device)
        padding = self.left_padding.to(tokens.device)
        prompt_end = padding + self.num_virtual_tokens
        # From prompt, padding, text to padding, prompt, text: which token of `prepended` the i-th of the result is.
        source = torch.where(i < padding, i + self.num_virtual_tokens, torch.where(i < prompt_end, i - padding, i))
        return _gather_tokens(prepended, source)

    def insert_value(self, tokens: Tensor, value: int) -> Tensor:
        """`insert` of one value for every virtual token."""
        shape = (tokens.shape[0], self.num_virtual_tokens, *tokens.shape[2:])
        return self.insert(tokens, tokens.new_full(shape, value))

    def remove(self, tokens: Tensor) -> Tensor:
        """The inverse of `insert`: of `tokens` [B, P + T, ...] the caller's own [B, T, ...]."""
        if self.left_padding is None:
            return tokens[:, self.num_virtual_tokens :]
        i = torch.arange(self.length, device=tokens.device)
        source = torch.where(i < self.left_padding.to(tokens.device), i, i + self.num_virtual_tokens)
        return _gather_tokens(tokens, source)

    def first_of_text(self, tokens: Tensor) -> Tensor:
        """Of `tokens` [B, T] the first after the left padding: [B, 1]."""
        if self.left_padding is None:
            return tokens[:, :1]
        return tokens.gather(1, self.left_padding.to(tokens.device).clamp(max=self.length - 1))


def _gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """`tokens[b, index[b, i]]` for `tokens` [B, N, ...] and `index` [B, M]: [B, M, ...]."""
    inner = tokens.shape[2:]
    index = index.view(*index.shape, *(1 for _ in inner)).expand(*index.shape, *inner)
    return tokens.gather(1, index)
