"""A call with labels of a model with a context-aware prompt: its loss is over the answers in the prompt too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...adapters import AdapterError
from ...nn import CPTConfig, CPTPrompt
from ...nn.cpt import cpt_labels, cpt_loss
from ..batch.layout import Layout
from ..batch.tasks import Rows
from ..positions.cache import cache_argument
from ..positions.positions import past_length

TYPES = "input_type_mask"
"""The argument of a call that gives the types of the text's tokens, as PEFT's."""


class AnswersLoss:
    """The loss of one call.

    Args:
        config: of the prompt.
        labels: of the text, `[B, T]`.
        types: of its tokens, `[B, T]`; None: all are answers.
        num_items: how many labels all batches have that one step of the optimizer sees; None: this one alone.
    """

    def __init__(self, config: CPTConfig, labels: Tensor, types: Tensor | None, num_items: Any) -> None:
        self.config, self.num_items = config, num_items
        self.num_labels = (labels[:, 1:] != -100).sum()
        self.labels, self.types = cpt_labels(config, labels, types)

    def put(self, output: Any, layout: Layout) -> Any:
        """`output`, whose logits are of prompt and text, with the loss."""
        logits = output[0] if isinstance(output, tuple) else output.logits
        virtual = layout.num_virtual_tokens
        labels, types = (layout.insert(x[:, virtual:], x[:, :virtual]) for x in (self.labels, self.types))
        loss = cpt_loss(self.config, logits, labels.to(logits.device), types.to(logits.device))
        if self.num_items is not None:  # the means of several batches, each by its share of the labels
            loss = loss * (self.num_labels.to(loss.device) / self.num_items)
        if isinstance(output, tuple):
            return loss, *output
        output.loss = loss
        return output


def take_answers_loss(kwargs: dict[str, Any], rows: Rows) -> AnswersLoss | None:
    """Takes the labels and what goes with them out of a call, in place; None: it has another loss, or none.

    Rows of a bank differ in their adapters, and have the loss of any text.

    Raises:
        ValueError: a call whose logits cannot be those of prompt and text.
        NotImplementedError: a packed batch.
    """
    task = rows.tasks[0] if len(rows.tasks) == 1 and rows.index is None else None
    if task is None or task.adapter.name is not None or not isinstance(task.adapter.module, CPTPrompt):
        return None
    types = kwargs.pop(TYPES, None)
    if kwargs.get("labels") is None:
        return None
    if kwargs.get("cu_seq_lens_q") is not None:
        raise NotImplementedError(
            "context-aware prompt tuning in a packed batch: its loss is over the answers in the prompt of each row, so "
            "pad the sequences into rows of their own"
        )
    keep = kwargs.get("logits_to_keep", 0)
    if isinstance(keep, Tensor) or keep:
        raise ValueError("the loss of context-aware prompt tuning needs all logits: leave logits_to_keep out")
    if cache_argument(kwargs) is not None and int(past_length(kwargs)):
        raise ValueError("the loss of context-aware prompt tuning needs the whole text: leave the cache out")
    labels = kwargs.pop("labels")
    for name, given in (("labels", labels), (TYPES, types)):
        if given is not None and (given.dim() != 2 or given.shape != labels.shape):
            raise ValueError(f"{name}: expected [B, T], as labels {list(labels.shape)}, got {list(given.shape)}")
    return AnswersLoss(task.adapter.module.config, labels, types, kwargs.pop("num_items_in_batch", None))


def prompt_of_examples(values: Tensor, examples: Tensor, config: CPTConfig) -> CPTPrompt:
    """A prompt that goes on learning from `values` [P, E], moved from the embeddings of its examples, [P, E].

    Raises:
        AdapterError: it has moved further than it may, so the examples are other tokens, or another model's.
    """
    prompt = CPTPrompt(examples.shape[1], config, examples)
    moved = values - prompt.embedding
    allowed = prompt._epsilon[:, 0] + 0.01 * prompt.embedding.norm(dim=1)
    far = (moved.norm(dim=1) > allowed).nonzero()[:, 0].tolist()
    if far:
        raise AdapterError(
            f"virtual token {far[0]} is further from the embedding of token {config.cpt_token_ids[far[0]]}, which "
            "cpt_token_ids says it began as, than it may move: the adapter was trained on another model"
        )
    with torch.no_grad():
        prompt.delta_embedding.copy_(torch.where(prompt._is_trained, moved, 0.0))
    return prompt
