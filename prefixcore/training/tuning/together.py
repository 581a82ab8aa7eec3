"""Several candidates in one batch: the same examples behind the virtual tokens of each, and a loss for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data import TokenizedExample, make_batch
from ..prompt_loss import PromptsToo, token_losses, weighed


class Together:
    """The losses of adapters of a `PromptBank` on one batch.

    The rows of a batch do not see each other, so each adapter has the loss, and by the sum of all losses the gradient,
    that it would have alone.

    Args:
        model: with the bank.
        pad_token_id: fills short batch rows.
        packed: batches without padding.
        prompt_loss_weight: as of `TrainingOptions`.
        seed: decides which tokens of long prompts are learnt.
    """

    def __init__(
        self, model: Any, pad_token_id: int, *, packed: bool, prompt_loss_weight: float = 0.0, seed: int = 0
    ) -> None:
        self.model, self.pad_token_id, self.packed = model, pad_token_id, packed
        self.weight, self.prompts_too = prompt_loss_weight, PromptsToo(seed)
        self.device = next(model.parameters()).device

    def losses(
        self, groups: Iterable[Sequence[str]], examples: Sequence[TokenizedExample]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each group of adapters the losses to minimise, [names], with a graph; and those of the answers alone.

        Mean losses in nats a token. All of them learn the same tokens.
        """
        if not self.weight:
            for names in groups:
                answers = self.token_losses(names, examples).mean(1)
                yield answers, answers
            return
        learnt = self.prompts_too(examples)
        for names in groups:
            yield weighed(self.token_losses(names, learnt.examples), learnt.is_answer, self.weight)

    def token_losses(self, names: Sequence[str], examples: Sequence[TokenizedExample]) -> Tensor:
        """The loss of each learnt token, [names, tokens]."""
        rows = [example for _ in names for example in examples]
        tasks = [name for name in names for _ in examples]
        batch = make_batch(rows, self.pad_token_id, packed=self.packed, device=self.device)
        labels: Tensor = batch.pop("labels")
        logits: Tensor = self.model(**batch, task_ids=tasks, use_cache=False).logits
        # Rows, and packed labels too, stand in the order of the names, each with as many.
        return token_losses(logits, labels).view(len(names), -1)

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
                        each = self.token_losses(some, examples[start : start + batch_size])
                        total, count = total + each.sum(1), count + each.shape[1]
                    found += (total / count).tolist()
        finally:
            self.model.train(was_training)
        return found


def groups(names: Sequence[str], at_once: int) -> list[list[str]]:
    """The names in parts of at most `at_once`, of sizes as equal as they can be."""
    count = -(-len(names) // at_once)
    size = -(-len(names) // count)
    return [list(names[start : start + size]) for start in range(0, len(names), size)]
