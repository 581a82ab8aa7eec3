"""Log-probabilities at the places that predict completions, in batches that fit a bound of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..training import TokenizedExample

MOST_NUMBERS = 2**25
"""Of the logits of one batch, [B, T, V]: 128 MiB in float32."""

MOST_ROWS = 16

Logits = Callable[[Tensor, Tensor], Tensor]
"""The logits [B, T, V] of ids [B, T] with a mask [B, T]."""


@dataclass(frozen=True)
class Batch:
    """Texts padded on the right, and where their completions are predicted.

    Attributes:
        rows: which of the texts these are.
        ids, mask: [B, T].
        owners: [N], for each completion token the row of the batch that it is in.
        places: [N], the place in its row that predicts it.
        labels: [N], the token.
    """

    rows: list[int]
    ids: Tensor
    mask: Tensor
    owners: Tensor
    places: Tensor
    labels: Tensor

    def scored(self, logits: Tensor) -> Tensor:
        """The log-probabilities [N, V], float32, of what may stand at each completion token."""
        return torch.log_softmax(logits[self.owners, self.places].float(), -1)


def batches(ids: Sequence[TokenizedExample], vocabulary: float, device: torch.device) -> Iterator[Batch]:
    """All texts, in order, as many at once as the bounds allow."""
    start = 0
    while start < len(ids):
        stop, longest = start, 0
        while stop < len(ids) and stop - start < MOST_ROWS:
            longer = max(longest, ids[stop].length)
            if stop > start and (stop - start + 1) * longer * vocabulary > MOST_NUMBERS:
                break
            stop, longest = stop + 1, longer
        yield _pad(ids[start:stop], list(range(start, stop)), longest, device)
        start = stop


def _pad(texts: Sequence[TokenizedExample], rows: list[int], longest: int, device: torch.device) -> Batch:
    ids, mask, owners, places, labels = [], [], [], [], []
    for row, text in enumerate(texts):
        padding = [0] * (longest - text.length)
        ids.append(text.prompt_ids + text.completion_ids + padding)
        mask.append([1] * text.length + padding)
        owners += [row] * len(text.completion_ids)
        places += [len(text.prompt_ids) - 1 + i for i in range(len(text.completion_ids))]
        labels += text.completion_ids
    return Batch(rows, *(torch.tensor(x, device=device) for x in (ids, mask, owners, places, labels)))


def losses(logits: Logits, ids: Sequence[TokenizedExample], vocabulary: float, device: torch.device) -> Tensor:
    """The loss of each completion token of each text, one after another, [N], in nats."""
    found = []
    for batch in batches(ids, vocabulary, device):
        log_probs = batch.scored(logits(batch.ids, batch.mask))
        found.append(-log_probs.gather(1, batch.labels[:, None])[:, 0].cpu())
    return torch.cat(found)


def per_text(values: Tensor, ids: Sequence[TokenizedExample]) -> list[float]:
    """The mean over each text's completion tokens of values [N]."""
    return [float(part.double().mean()) for part in values.split([len(text.completion_ids) for text in ids])]


def model_logits(model: Any) -> Logits:
    """Those of a model as it is, with what is attached to it."""

    def call(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            output: Any = model(input_ids=ids, attention_mask=mask, use_cache=False)
        logits: Tensor = output.logits
        return logits

    return call
