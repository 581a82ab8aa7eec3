"""One row of numbers for each token of some texts, in memory or in a file that is mapped into it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..data import TokenizedExample

Text = tuple[int, ...]
"""The token ids of an example, prompt and completion."""


def text_of(example: TokenizedExample) -> Text:
    """What an example's activations depend on: its labels are not among it."""
    return (*example.prompt_ids, *example.completion_ids)


def distinct(examples: Iterable[TokenizedExample]) -> list[Text]:
    """The texts of examples, each once, in their order."""
    return list(dict.fromkeys(text_of(example) for example in examples))


def texts_digest(texts: Iterable[Text]) -> str:
    """SHA-256 (hex) of token ids and of where each text ends."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(torch.tensor(text, dtype=torch.long).numpy().tobytes())
    return digest.hexdigest()


class Rows:
    """Rows [E] for the tokens of some texts.

    Args:
        texts: each once.
        values: [tokens, E], of all texts one after another; what of it is known yet, `known` says.

    Attributes:
        known: the texts whose rows have been put.
    """

    def __init__(self, texts: Sequence[Text], values: Tensor) -> None:
        self.values = values
        self.known: set[Text] = set()
        self._where: dict[Text, slice] = {}
        start = 0
        for text in texts:
            self._where[text] = slice(start, start + len(text))
            start += len(text)
        if start != len(values):
            raise ValueError(f"expected one row for each of {start} tokens, got {len(values)}")

    @property
    def is_complete(self) -> bool:
        """Whether the rows of every text are known."""
        return len(self.known) == len(self._where)

    @property
    def texts(self) -> list[Text]:
        """All of them, in their order."""
        return list(self._where)

    def put(self, text: Text, rows: Tensor) -> None:
        """Keeps the rows [tokens, E] of a text; of one that was not announced nothing is kept."""
        where = self._where.get(text)
        if where is not None:
            self.values[where] = rows.to(self.values.device, self.values.dtype)
            self.known.add(text)

    def get(self, text: Text) -> Tensor:
        """The rows [tokens, E] of a text that is known."""
        return self.values[self._where[text]]
