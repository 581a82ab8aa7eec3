"""Soft prompts in a call: virtual tokens put into the input of each row, and taken out of the output.

The first call of a sequence gets the prompt, as embeddings before the text. A cache keeps it, so that later calls only
have their mask and positions moved. The loss is that of the longer sequence, whose labels at virtual tokens are -100,
as in PEFT: the first text token is predicted from the last virtual one. Where it is divided by `num_items_in_batch`,
first tokens have no label, as Trainer does not count them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..batch.layout import Layout
from ..positions.cache import cache_argument, counts_tokens
from ..positions.model_inputs import (
    SEQUENCE,
    has_axes,
    head_of,
    insert_positions,
    positions_from_mask,
    restarts,
    text_positions,
)
from ..positions.positions import query_length
from .prompt_arguments import tokens
from .prompt_embeddings import insert_embeddings
from .prompts import Prompts, missing_tokens

SPANS = ("start_positions", "end_positions")
"""Arguments of a head for question answering that say at which token of a row something stands."""


def insert(
    model: PreTrainedModel, names: list[str], kwargs: dict[str, Any], prompts: Prompts, first_position: int = 0
) -> Layout:
    """Puts the prompts into the arguments of a call that starts a sequence, in place.

    Args:
        model: the model that is called.
        names: its forward's arguments.
        kwargs: the arguments of the call.
        prompts: of each row.
        first_position: where the model places the first token of a text by itself: at 2 in RoBERTa.
    """
    (batch_size, length), virtual = tokens(kwargs).shape[:2], prompts.longest
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    device = tokens(kwargs).device
    is_long = mask is not None and mask.shape[1] > length  # as that of a text of which a cache gets the first part
    if mask is not None and (mask.shape[1] < length or (is_long and cache_argument(kwargs) is None)):
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
        kwargs["position_ids"] = positions_from_mask(kwargs["attention_mask"]) + first_position
    if kwargs.get("labels") is not None and head_of(model) != SEQUENCE:
        labels = kwargs["labels"]
        if model.can_generate():
            labels = _predictable(labels, layout, prompts)
            if kwargs.get("num_items_in_batch") is not None:
                labels = torch.nn.functional.pad(labels[:, 1:], (1, 0), value=-100)
        kwargs["labels"] = layout.insert_value(labels, -100)
    for name in SPANS:
        if isinstance(kwargs.get(name), Tensor):
            kwargs[name] = _moved(kwargs[name], layout)
    insert_embeddings(model, kwargs, layout, prompts)
    return layout


def _moved(places: Tensor, layout: Layout) -> Tensor:
    """Places of tokens in the rows of a text, [B] or [B, 1], as places in those with virtual tokens."""
    lead: Any = 0 if layout.left_padding is None else layout.left_padding.to(places.device).view(-1)
    lead = lead if places.dim() < 2 or isinstance(lead, int) else lead[:, None]
    return places + layout.num_virtual_tokens * (places >= lead)


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
        expected = None if counted is None else int(counted.max()) + 1 - first_position if counted.numel() else 0
    if expected is not None and expected + virtual != seen and counts_tokens(cache_argument(kwargs)):
        raise ValueError(
            f"the mask or the positions speak of {expected} tokens, but cache and input hold {seen - virtual} "
            f"besides the {virtual} virtual ones: give the mask of all of them. With prefill_chunk_size generate "
            "cannot go on from a cache that holds a soft prompt (it cuts the input by the length of the cache): leave "
            "prefill_chunk_size out, or pass the whole text without the cache"
        )
    if positions is not None:
        kwargs["position_ids"] = positions + virtual if missing is None else positions + virtual - missing
    elif mask is not None and "position_ids" in names and not has_axes(model):
        kwargs["position_ids"] = positions_from_mask(kwargs["attention_mask"])[:, -query_length(kwargs) :]


def _is_full(padding: Tensor, length: int) -> bool:
    return not torch.compiler.is_compiling() and bool((padding == length).any())


def without_prompt(output: Any, layout: Layout, keep: tuple[str, ...] = ()) -> Any:
    """`output` with the virtual tokens taken out of every tensor [B, P + T] or [B, P + T, ...] in it.

    Attention weights [B, H, P + T, P + T] keep what they say about the prompt, and a cache what it holds.
    Fields of the names in `keep` stay. What is left is contiguous, as the model's own is and Liger's losses need it;
    but logits, which may be most of the memory, are a view.
    """
    if isinstance(output, Tensor):
        length = layout.num_virtual_tokens + layout.length
        if output.dim() in (2, 3) and output.shape[:2] == (layout.batch_size, length):
            return layout.remove(output)
        return output
    if isinstance(output, dict):  # transformers' ModelOutput
        for name in [name for name in output if name not in keep]:
            own = without_prompt(output[name], layout)
            output[name] = own.contiguous() if isinstance(own, Tensor) and name != "logits" else own
        return output
    if isinstance(output, (tuple, list)):
        return type(output)(without_prompt(each, layout) for each in output)
    return output
