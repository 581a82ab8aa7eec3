"""Several candidates in one batch: the same examples behind the virtual tokens of each, and a loss for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..data import IGNORED, TokenizedExample, make_batch


class Together:
    """The losses of adapters of a `PromptBank` on one batch.

    The rows of a batch do not see each other, so each adapter has the loss, and by the sum of all losses the gradient,
    that it would have alone.

    Args:
        model: with the bank.
        pad_token_id: fills short batch rows.
        packed: batches without padding.
    """

    def __init__(self, model: Any, pad_token_id: int, *, packed: bool) -> None:
        self.model, self.pad_token_id, self.packed = model, pad_token_id, packed
        self.device = next(model.parameters()).device

    def losses(self, names: Sequence[str], examples: Sequence[TokenizedExample]) -> Tensor:
        """Mean loss in nats a completion token, [names], with a graph where gradients are recorded."""
        total, tokens = self.sums(names, examples)
        return total / tokens

    def sums(self, names: Sequence[str], examples: Sequence[TokenizedExample]) -> tuple[Tensor, int]:
        """The losses of all completion tokens together, [names]; and how many tokens each adapter has."""
        rows = [example for _ in names for example in examples]
        tasks = [name for name in names for _ in examples]
        batch = make_batch(rows, self.pad_token_id, packed=self.packed, device=self.device)
        labels: Tensor = batch.pop("labels")
        logits: Tensor = self.model(**batch, task_ids=tasks, use_cache=False).logits
        labels, logits = labels[:, 1:], logits[:, :-1]
        kept = labels != IGNORED
        # Rows, and packed labels too, stand in the order of the names, each with as many.
        each = cross_entropy(logits[kept].float(), labels[kept], reduction="none").view(len(names), -1)
        return each.sum(1), each.shape[1]

    def held_out(
        self, names: Sequence[str], examples: Sequence[TokenizedExample], *, batch_size: int = 16, at_once: int = 1
    ) -> list[float]:
        """Mean loss of each adapter over every completion token of some examples, `at_once` adapters in one batch."""
        was_training = self.model.training
        self.model.eval()
        found: list[float] = []
        try:
            with torch.no_grad():
                for some in groups(names, at_once):
                    total, count = torch.zeros(len(some), device=self.device), 0
                    for start in range(0, len(examples), batch_size):
                        sums, tokens = self.sums(some, examples[start : start + batch_size])
                        total, count = total + sums, count + tokens
                    found += (total / count).tolist()
        finally:
            self.model.train(was_training)
        return found


def groups(names: Sequence[str], at_once: int) -> list[list[str]]:
    """The names in parts of at most `at_once`, of sizes as equal as they can be."""
    count = -(-len(names) // at_once)
    size = -(-len(names) // count)
    return [list(names[start : start + size]) for start in range(0, len(names), size)]
