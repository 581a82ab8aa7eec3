"""The loss of prompts' words beside that of the answers.

A few examples are soon learnt by heart. What the prompts themselves say is learnt along with their answers, which holds
virtual tokens to what the task is about and leaves less room for that (Shi et al., arXiv:2405.14394: most where
examples are few and answers short).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .batch import Batch, Call
from .data import IGNORED, TokenizedExample

MOST = 64
"""Of how many tokens of a prompt the loss is taken in a step: of more, as many are drawn anew each time.

Logits are a whole vocabulary for each, which a long prompt would be made dear by."""


@dataclass(frozen=True)
class Learnt:
    """Examples whose prompts are learnt too.

    Attributes:
        examples: the same tokens, with labels on some or all of the prompt's.
        is_answer: for each label, one example after the other, whether it was one before.
    """

    examples: list[TokenizedExample]
    is_answer: Tensor


class PromptsToo:
    """Has examples' prompts learnt too.

    Args:
        seed: decides which tokens of long prompts are taken.

    Examples:
        >>> from prefixcore.training import TokenizedExample
        >>> from prefixcore.training.prompt_loss import PromptsToo
        >>> learnt = PromptsToo(seed=0)([TokenizedExample(prompt_ids=[5, 6, 7], completion_ids=[8])])
        >>> learnt.examples[0].labels, learnt.is_answer.tolist()
        ([-100, 6, 7, 8], [False, False, True])
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, examples: Sequence[TokenizedExample]) -> Learnt:
        found, is_answer = [], []
        for example in examples:
            ids, answers = example.prompt_ids + example.completion_ids, example.labels
            prompt = [place for place in range(1, len(ids)) if answers[place] == IGNORED]
            if len(prompt) > MOST:
                prompt = [prompt[i] for i in torch.randperm(len(prompt), generator=self._generator)[:MOST].tolist()]
            chosen = set(prompt)
            learnt = [place in chosen or answers[place] != IGNORED for place in range(1, len(ids))]
            found.append(TokenizedExample(ids[:1], ids[1:], learnt))
            is_answer += [label != IGNORED for label, is_learnt in zip(answers[1:], learnt, strict=True) if is_learnt]
        return Learnt(found, torch.tensor(is_answer))


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss in nats of each token with a label, float32 [labels], row after row.

    Args:
        logits: [B, T, V]; those of more tokens before them are left out, which are virtual ones.
        labels: [B, T]; those at i + 1 belong to the logits at i.
    """
    rows = logits[:, -labels.shape[1] : -1].flatten(0, 1)
    tokens = labels[:, 1:].flatten().to(rows.device)  # where a model lies on several devices
    kept = tokens != IGNORED
    if not bool(kept.all()):  # a packed batch has no others, and its logits need not be copied
        tokens, rows = tokens[kept], rows[kept]
    return cross_entropy(rows.float(), tokens, reduction="none")


def weighed(losses: Tensor, is_answer: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The loss to minimise, and that of the answers alone.

    Args:
        losses: [..., labels] of tokens.
        is_answer: bool [labels].
        weight: of the prompts' mean beside that of the answers.
    """
    is_prompt = (~is_answer).nonzero()[:, 0].to(losses.device)
    answers = losses[..., is_answer.nonzero()[:, 0].to(losses.device)].mean(-1)
    return (answers + weight * losses[..., is_prompt].mean(-1) if len(is_prompt) else answers), answers


def _requires_labels(model: Any) -> bool:
    """Whether a model cannot be called for its logits alone."""
    labels = signature(model.forward).parameters.get("labels")
    return labels is not None and labels.default is Parameter.empty


def loss_with_prompts(model: Any, batch: Batch, is_answer: Tensor, weight: float, call: Call) -> tuple[Tensor, Tensor]:
    """The loss of a batch to minimise, a scalar with a graph, and that of its answers alone.

    Args:
        model: returns logits.
        batch: of examples that `PromptsToo` has made.
        is_answer: from there.
        weight: of the prompts.
        call: calls the model.

    Raises:
        ValueError: the model returns no logits.
    """
    arguments = dict(batch.arguments)
    labels = arguments["labels"] if _requires_labels(model) else arguments.pop("labels")
    logits = getattr(call(model, Batch(batch.examples, arguments, batch.places)), "logits", None)
    if logits is None:
        raise ValueError(
            f"{type(model).__name__} returns no logits, of which the loss of prompts is made: give prompt_loss_weight=0"
        )
    return weighed(token_losses(logits, labels), is_answer, weight)
