"""Soft prompts in a call: virtual tokens put into the input of each row, and taken out of the output.

The first call of a sequence gets the prompt, as embeddings before the text. A cache keeps it, so that later calls only
have their mask and positions moved. The loss is that of the longer sequence, whose labels at virtual tokens are -100,
as in PEFT: the first text token is predicted from the last virtual one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..ops import soft_embedding
from .cache import cache_argument, counts_tokens
from .layout import Layout
from .model_inputs import (
    SEQUENCE,
    TOKEN_TYPES,
    has_axes,
    head_of,
    insert_positions,
    insert_token_types,
    positions_from_mask,
    reads_ids,
    restarts,
    stand_in,
    stand_ins,
    text_positions,
)
from .positions import check_limit, query_length

_INSERTED = "_prefixcore_inserted"
"""The attribute of input embeddings that hold a prompt."""

_TOKEN_ARGUMENTS = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", *TOKEN_TYPES}
"""Arguments with a value a token for which the value at virtual tokens is known."""


class Prompts:
    """The soft prompts of the rows of a call.

    Attributes:
        values: those that some row has, [P, E] each.
        index: for each row which of `values` it has; -1: none.
        counts: for each row how many virtual tokens.
        longest: the most that a row has. All rows get so many more tokens; what a row has fewer is padding on its left.
    """

    def __init__(self, values: Sequence[Tensor], index: Sequence[int]) -> None:
        self.values, self.index = list(values), list(index)
        self.counts = [0 if i < 0 else len(self.values[i]) for i in self.index]
        self.longest = max(self.counts, default=0)

    @property
    def is_one(self) -> bool:
        """Whether all rows have the same."""
        return len(self.values) == 1 and min(self.index, default=0) >= 0

    @property
    def table(self) -> Tensor:
        """All of `values`, [N, E]."""
        return self.values[0] if len(self.values) == 1 else torch.cat(self.values)

    def table_starts(self) -> list[int]:
        """Where each of `values` begins in `table`."""
        return [0, *itertools.accumulate(len(value) for value in self.values)][:-1]

    def table_rows(self, first: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Where each of the rows' virtual tokens is in `table`, counted from `first`: [B, longest], on the right."""
        starts, rows = self.table_starts(), []
        for i, count in zip(self.index, self.counts, strict=True):
            here = starts[i] if i >= 0 else 0
            rows.append([first] * (self.longest - count) + list(range(first + here, first + here + count)))
        if self.is_one:
            return torch.tensor(rows[:1], device=device, dtype=dtype).expand(len(rows), -1)
        return torch.tensor(rows, device=device, dtype=dtype)


def is_inserted(embeds: Any) -> bool:
    """Whether input embeddings hold a prompt."""
    return hasattr(embeds, _INSERTED)


def mark_inserted(embeds: Tensor) -> None:
    """Marks input embeddings as holding a prompt."""
    if not torch.compiler.is_compiling():
        setattr(embeds, _INSERTED, True)


def missing_tokens(counts: Sequence[int], device: torch.device, longest: int | None = None) -> Tensor | None:
    """[B, 1]: how many virtual tokens fewer than the longest each row has; None: all rows have as many."""
    longest = max(counts, default=0) if longest is None else longest
    if min(counts, default=0) == longest:
        return None
    return torch.tensor([[longest - count] for count in counts], device=device)


def insert(model: PreTrainedModel, names: list[str], kwargs: dict[str, Any], prompts: Prompts) -> Layout:
    """Puts the prompts into the arguments of a call that starts a sequence, in place.

    Args:
        model: the model that is called.
        names: its forward's arguments.
        kwargs: the arguments of the call.
        prompts: of each row.
    """
    (batch_size, length), virtual = tokens(kwargs).shape[:2], prompts.longest
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    device = tokens(kwargs).device
    if mask is not None and mask.shape[1] < length:
        raise ValueError(f"attention_mask: expected a padding mask of all {length} tokens, got {list(mask.shape)}")
    missing = missing_tokens(prompts.counts, device)
    if missing is not None and mask is None:
        mask = torch.ones(batch_size, length, dtype=torch.long, device=device)
    layout = Layout.from_mask(mask, batch_size, length, virtual)
    padding = layout.left_padding
    if cache_argument(kwargs) is not None and padding is not None and _is_full(padding, length):
        raise ValueError(
            "a row of the first call with a cache is all padding, so there is no text yet that its soft prompt "
            "could precede: raise prefill_chunk_size above the longest padding, or leave it out"
        )
    takes_positions = "position_ids" in names and not has_axes(model)
    if positions is not None and mask is None and not torch.compiler.is_compiling() and restarts(positions):
        raise NotImplementedError(
            "position_ids restart within a row (a packed batch), but there is no cu_seq_lens_q that says where: a "
            "soft prompt needs it (PackedCollator gives it); or pad the sequences into rows of their own"
        )

    if mask is not None:
        kwargs["attention_mask"] = insert_mask(mask, layout, missing)
    if positions is not None:
        kwargs["position_ids"] = insert_positions(positions, layout, missing)
    elif (padding is not None or missing is not None or _has_gaps(mask)) and takes_positions:
        kwargs["position_ids"] = positions_from_mask(kwargs["attention_mask"])
    if kwargs.get("labels") is not None and head_of(model) != SEQUENCE:
        kwargs["labels"] = layout.insert_value(_predictable(kwargs["labels"], layout, prompts), -100)
    insert_embeddings(model, kwargs, layout, prompts)
    return layout


def _predictable(labels: Tensor, layout: Layout, prompts: Prompts) -> Tensor:
    """Labels [B, T] without those of first tokens in rows that have no prompt, where nothing comes before them."""
    if min(prompts.counts) > 0:
        return labels
    bare = torch.tensor([[count == 0] for count in prompts.counts], device=labels.device)
    first = 0 if layout.left_padding is None else layout.left_padding.to(labels.device)
    is_first = torch.arange(layout.length, device=labels.device) == first
    return labels.masked_fill(bare & is_first, -100)


def _has_gaps(mask: Tensor | None) -> bool:
    """Whether padding stands between tokens of a text, in a mask [B, T] whose rows have none on the left."""
    return mask is not None and bool((mask[:, 1:].bool() & ~mask[:, :-1].bool()).any())


def insert_mask(mask: Tensor, layout: Layout, missing: Tensor | None) -> Tensor:
    """A padding mask [B, T] of a text as one [B, P + T] of the text with its prompt."""
    if missing is None:
        return layout.insert_value(mask, 1)
    slots = torch.arange(layout.num_virtual_tokens, device=mask.device)
    return layout.insert(mask, (slots >= missing.to(mask.device)).to(mask.dtype))


def continue_after(
    model: PreTrainedModel,
    names: list[str],
    kwargs: dict[str, Any],
    counts: Sequence[int],
    past: Any,
    is_own_cache: bool,
    first_position: int,
    virtual: int,
) -> None:
    """Moves the mask and the positions of a call whose cache starts with prompts, in place.

    Args:
        model: the model that is called.
        names: its forward's arguments.
        kwargs: the arguments of the call.
        counts: how many virtual tokens the cache holds of each row.
        past: how many tokens it holds.
        is_own_cache: whether positions may be read, which makes a GPU wait: not in each step of a plain generate.
        first_position: where the first token of the caller stands.
        virtual: how many tokens of the cache are there for virtual tokens in each row.
    """
    seen = past + query_length(kwargs)
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    missing = missing_tokens(counts, tokens(kwargs).device, virtual)
    if mask is None and missing is not None and counts_tokens(cache_argument(kwargs)):
        mask = torch.ones(len(counts), seen - virtual, dtype=torch.long, device=tokens(kwargs).device)
    expected = None
    if mask is not None:
        expected = mask.shape[1]
        # The mask is of the whole sequence, so it shows the padding that the prompt stands after.
        layout = Layout.from_mask(mask, mask.shape[0], expected, virtual)
        kwargs["attention_mask"] = insert_mask(mask, layout, missing)
    elif positions is not None and is_own_cache:
        counted = text_positions(model, positions)
        expected = None if counted is None else int(counted.max()) + 1 - first_position
    if expected is not None and expected + virtual != seen and counts_tokens(cache_argument(kwargs)):
        raise ValueError(
            f"the mask or the positions speak of {expected} tokens, but cache and input hold {seen - virtual} "
            f"besides the {virtual} virtual ones; generate cannot go on from a cache that holds a soft prompt (it "
            "cuts the input by the length of the cache): pass the whole text without the cache, or attach a prefix"
        )
    if positions is not None:
        kwargs["position_ids"] = positions + virtual if missing is None else positions + virtual - missing
    elif mask is not None and "position_ids" in names and not has_axes(model):
        kwargs["position_ids"] = positions_from_mask(kwargs["attention_mask"])[:, -query_length(kwargs) :]


def check_positions(kwargs: dict[str, Any], virtual: int, needed: int, limit: int | None) -> None:
    """Raises ValueError if a call with its prompt needs more positions than the model has learned."""
    if limit is not None and needed > limit:
        given = kwargs.get("position_ids")
        check_limit(needed if given is None else int(given.max()) + 1, virtual, limit)


def tokens(kwargs: dict[str, Any]) -> Tensor:
    """What the input of a call is given as: ids [B, T] or embeddings [B, T, E]."""
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    return cast(Tensor, embeds if ids is None else ids)


def _is_full(padding: Tensor, length: int) -> bool:
    return not torch.compiler.is_compiling() and bool((padding == length).any())


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
            f"{type(model).__name__} looks at the ids of its tokens besides their embeddings, so a soft prompt on it "
            "needs input_ids, but was given inputs_embeds alone"
        )
    kwargs["input_ids"] = layout.insert_value(kwargs["input_ids"], stand_in(model))


def in_place_of_stand_ins(model: PreTrainedModel, layout: Any, prompts: Prompts) -> AbstractContextManager[None]:
    """A block for the call of a model that was given ids with stand-ins; for one that was not, nothing."""
    if not reads_ids(model) or not isinstance(layout, Layout):
        return nullcontext()
    table = prompts.table
    rows = table[prompts.table_rows(0, table.device, torch.long)]
    return stand_ins(model.get_input_embeddings(), layout, rows)


def _embed(
    model: PreTrainedModel, layout: Layout, prompts: Prompts, ids: Tensor | None, embeds: Tensor | None
) -> Tensor:
    """Embeddings [B, P + T, E] of an input with its prompts."""
    table = prompts.table
    embed: Any = model.get_input_embeddings()
    if ids is not None and ids.numel():
        size = embed.weight.shape[0]
        check_range(ids, size)
        if _is_plain_table(embed):
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
    if _is_plain_table(embed):
        return soft_embedding(new_ids, embed.weight, table.to(embed.weight.device))
    embeds = embed(text)
    rows = (new_ids - size).clamp(min=0)
    return torch.where(virtual[..., None], table.to(device=embeds.device, dtype=embeds.dtype)[rows], embeds)


def check_range(ids: Tensor, size: int) -> None:
    """Raises IndexError for ids beyond the table, which would name virtual tokens."""
    if torch.compiler.is_compiling():  # compiled code cannot read values, and asserts when it runs
        torch._assert_async(((ids >= 0) & (ids < size)).all(), f"input_ids must be from 0 to {size - 1}")
        return
    low, high = torch.stack(torch.aminmax(ids)).tolist()  # together: each read makes a GPU wait
    if low < 0 or high >= size:
        raise IndexError(f"input_ids must be from 0 to {size - 1}, got {low} to {high}")


def _is_plain_table(embed: nn.Module) -> bool:
    """Whether the embedding is a look-up and nothing else: no scaling, no hooks, no other forward."""
    return (
        type(embed).forward is nn.Embedding.forward
        and "forward" not in embed.__dict__
        and not embed._forward_hooks
        and not embed._forward_pre_hooks
        and embed.max_norm is None
        and not embed.weight.requires_grad
    )


def check_arguments(kwargs: dict[str, Any], axes: bool) -> None:
    """Raises for arguments that soft prompts cannot be put into."""
    cache, mask, positions = cache_argument(kwargs), kwargs.get("attention_mask"), kwargs.get("position_ids")
    if cache is not None and cache.is_compileable and counts_tokens(cache):
        raise NotImplementedError(
            "a static cache has no room for the virtual tokens of a soft prompt: generate with a dynamic cache "
            "(leave cache_implementation out), or attach a prefix, which needs no room"
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise NotImplementedError(
            "a soft prompt needs attention_mask as a padding mask [B, T]: a mask made for the input alone says nothing "
            "about the virtual tokens"
        )
    if positions is not None and positions.dim() not in ((2, 3) if axes else (2,)):
        expected = "[B, T] or [axes, B, T]" if axes else "[B, T]"
        raise NotImplementedError(f"a soft prompt needs position_ids {expected}, got {list(positions.shape)}")
    if isinstance(kwargs.get("logits_to_keep"), Tensor) and kwargs.get("cu_seq_lens_q") is None:
        raise NotImplementedError(
            "a soft prompt needs logits_to_keep as a number of last tokens, got a tensor of token indices, which is "
            "for packed batches"
        )
    packed = kwargs.get("cu_seq_lens_q") is not None
    given = kwargs.get("input_ids")
    given = kwargs.get("inputs_embeds") if given is None else given
    if isinstance(given, Tensor) and given.dim() < 2:
        raise ValueError(f"the model needs input_ids [B, T] or inputs_embeds [B, T, E], got {list(given.shape)}")
    if not isinstance(given, Tensor) or given.shape[1] < 2:  # [B, 1] is also the shape of what is not per token
        return
    for name, value in kwargs.items():
        if name in _TOKEN_ARGUMENTS or (packed and name == "seq_idx"):
            continue
        if isinstance(value, Tensor) and value.shape[:2] == given.shape[:2]:
            raise NotImplementedError(f"{name} has a value a token, and none is known for virtual tokens")


def without_prompt(output: Any, layout: Layout, keep: tuple[str, ...] = ()) -> Any:
    """`output` with the virtual tokens taken out of every tensor [B, P + T] or [B, P + T, ...] in it.

    Attention weights [B, H, P + T, P + T] keep what they say about the prompt, and a cache what it holds.
    Fields of the names in `keep` stay.
    """
    if isinstance(output, Tensor):
        length = layout.num_virtual_tokens + layout.length
        if output.dim() in (2, 3) and output.shape[:2] == (layout.batch_size, length):
            return layout.remove(output)
        return output
    if isinstance(output, dict):  # transformers' ModelOutput
        for name in [name for name in output if name not in keep]:
            output[name] = without_prompt(output[name], layout)
        return output
    if isinstance(output, (tuple, list)):
        return type(output)(without_prompt(each, layout) for each in output)
    return output
