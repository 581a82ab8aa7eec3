"""What a call with soft prompts is given as its input: embeddings, or ids with stand-ins for virtual tokens."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...ops import soft_embedding
from ...ops.checks import of_all_calls
from ..batch.layout import Layout
from ..model.devices import is_plain
from ..positions.model_inputs import (
    insert_token_types,
    put_virtual,
    reads_ids,
    stand_in,
    stand_ins,
)
from .prompts import Prompts

_INSERTED = "_prefixcore_inserted"
"""The attribute of input embeddings that hold a prompt."""


def is_inserted(embeds: Any) -> bool:
    """Whether input embeddings hold a prompt."""
    return hasattr(embeds, _INSERTED)


def mark_inserted(embeds: Tensor) -> None:
    """Marks input embeddings as holding a prompt."""
    if not torch.compiler.is_compiling():
        setattr(embeds, _INSERTED, True)


def insert_embeddings(model: PreTrainedModel, kwargs: dict[str, Any], layout: Layout, prompts: Prompts) -> None:
    """Gives the call embeddings with the prompts in place of its input, and what has to go with them."""
    if isinstance(kwargs.get("logits_to_keep"), int) and kwargs["logits_to_keep"] > layout.length:
        kwargs["logits_to_keep"] = 0
    insert_token_types(model, kwargs, layout)
    if reads_ids(model) and isinstance(layout, Layout):
        return _insert_stand_ins(model, kwargs, layout)
    kwargs["inputs_embeds"] = _embed(model, layout, prompts, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    kwargs["input_ids"] = None
    mark_inserted(kwargs["inputs_embeds"])


def _insert_stand_ins(model: PreTrainedModel, kwargs: dict[str, Any], layout: Layout) -> None:
    """Gives the call ids in which stand-ins are virtual tokens, whose embeddings `stand_ins` puts in."""
    if kwargs.get("input_ids") is None:
        raise NotImplementedError(
            f"{type(model).__name__} makes more of ids than their embeddings, so a soft prompt on it "
            "needs input_ids, but was given inputs_embeds alone"
        )
    kwargs["input_ids"] = layout.insert_value(kwargs["input_ids"], stand_in(model))


def in_place_of_stand_ins(model: PreTrainedModel, layout: Any, prompts: Prompts) -> AbstractContextManager[None]:
    """A block for the call of a model that was given ids with stand-ins; for one that was not, nothing."""
    if not reads_ids(model) or not isinstance(layout, Layout):
        return nullcontext()
    table = prompts.table
    rows = table[prompts.table_rows(0, table.device, torch.long)]
    return stand_ins(model.get_input_embeddings(), partial(put_virtual, layout, rows))


def _embed(
    model: PreTrainedModel, layout: Layout, prompts: Prompts, ids: Tensor | None, embeds: Tensor | None
) -> Tensor:
    """Embeddings [B, P + T, E] of an input with its prompts."""
    table = prompts.table
    embed: Any = model.get_input_embeddings()
    if ids is not None and ids.numel():
        size = embed.weight.shape[0]
        check_range(ids, size)
        if is_plain_table(embed):
            # Ids from V upwards are virtual tokens to the op.
            virtual = prompts.table_rows(size, ids.device, ids.dtype)
            return soft_embedding(layout.insert(ids, virtual), embed.weight, table.to(embed.weight.device))
    if embeds is None:
        embeds = embed(ids)
    table = table.to(device=embeds.device, dtype=embeds.dtype)
    if prompts.is_one:
        return layout.insert(embeds, table.expand(layout.batch_size, -1, -1))
    return layout.insert(embeds, table[prompts.table_rows(0, table.device, torch.long)])


def embed_rows(model: PreTrainedModel, ids: Tensor, new_ids: Tensor, virtual: Tensor, prompts: Prompts) -> Tensor:
    """Embeddings [B, T, E] of `new_ids`, in which ids from V upwards name rows of the prompts' table.

    Args:
        model: the model that is called.
        ids: [B, T] as they were; those that stand for virtual tokens may be ids beyond the table.
        new_ids: [B, T].
        virtual: bool [B, T], where virtual tokens stand.
        prompts: of each row.
    """
    table = prompts.table
    embed: Any = model.get_input_embeddings()
    size = embed.weight.shape[0]
    text = ids.masked_fill(virtual, 0)
    check_range(text, size)
    if is_plain_table(embed):
        return soft_embedding(new_ids, embed.weight, table.to(embed.weight.device))
    embeds = embed(text)
    rows = (new_ids - size).clamp(min=0)
    return torch.where(virtual[..., None], table.to(device=embeds.device, dtype=embeds.dtype)[rows], embeds)


def check_range(ids: Tensor, size: int) -> None:
    """Raises IndexError for ids beyond the table, which would name virtual tokens."""
    if torch.compiler.is_compiling():  # compiled code cannot read values, and asserts when it runs
        torch._assert_async(((ids >= 0) & (ids < size)).all(), f"input_ids must be from 0 to {size - 1}")
        return
    low, high = torch.stack(torch.aminmax(of_all_calls(ids))).tolist()  # together: each read makes a GPU wait
    if low < 0 or high >= size:
        raise IndexError(f"input_ids must be from 0 to {size - 1}, got {low} to {high}")


def is_plain_table(embed: nn.Module) -> bool:
    """Whether the embedding is a look-up and nothing else: no scaling, no hooks, no other forward, plain numbers."""
    return (
        type(embed).forward is nn.Embedding.forward
        and "forward" not in embed.__dict__
        and not embed._forward_hooks
        and not embed._forward_pre_hooks
        and embed.max_norm is None
        and not embed.weight.requires_grad
        and is_plain(embed.weight)
    )
