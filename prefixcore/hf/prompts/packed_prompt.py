"""Soft prompts in a packed batch: one that stands once before all sequences, or one before each.

The model is causal, so virtual tokens do not depend on the text after them, and each sequence sees the one prompt as it
would in a batch row of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..batch.layout import Layout
from ..batch.packing import set_empty_mask
from .prompt_arguments import tokens
from .prompt_embeddings import check_range, insert_embeddings, mark_inserted
from .prompts import Prompts


def insert_shared(model: PreTrainedModel, kwargs: dict[str, Any], prompts: Prompts) -> Layout:
    """Puts one prompt before all sequences of a packed batch, in place."""
    virtual, length = prompts.longest, tokens(kwargs).shape[1]
    layout = Layout(1, length, virtual)
    set_empty_mask(kwargs, virtual)
    positions = kwargs["position_ids"] + virtual
    kwargs["position_ids"] = layout.insert(positions, torch.arange(virtual, device=positions.device)[None])
    keep = kwargs.get("logits_to_keep")
    if isinstance(keep, Tensor):  # labels are those of the logits kept, none of which is at a virtual token
        keep = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        kwargs["logits_to_keep"] = torch.where(keep < 0, keep, keep + virtual)  # negative ones count from the end
    elif kwargs.get("labels") is not None:
        kwargs["labels"] = layout.insert_value(kwargs["labels"], -100)
    insert_embeddings(model, kwargs, layout, Prompts(prompts.values, [0]))
    return layout


class PackedLayout:
    """A packed batch in which each sequence has a prompt of its own before it.

    Args:
        cu_seqlens: int [sequences + 1], of the text.
        prompts: of each sequence.
    """

    batch_size = 1

    def __init__(self, cu_seqlens: Tensor, prompts: Prompts) -> None:
        device, ends = cu_seqlens.device, cu_seqlens.tolist()
        counts = torch.tensor(prompts.counts, device=device)
        self.length, self.num_virtual_tokens = ends[-1], sum(prompts.counts)
        before = counts.cumsum(0)  # how many virtual tokens precede the text of each sequence
        self.per_token = counts.repeat_interleave(cu_seqlens.diff())
        self.own = torch.arange(self.length, device=device) + before.repeat_interleave(cu_seqlens.diff())
        self.cu_seqlens = cu_seqlens + torch.nn.functional.pad(before, (1, 0)).to(cu_seqlens.dtype)

    def insert(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        """`prompt` [N, ...], those of all sequences in turn, put into `tokens` [1, T, ...]: [1, N + T, ...]."""
        is_own = torch.zeros(self.num_virtual_tokens + self.length, dtype=torch.bool, device=tokens.device)
        is_own[self.own] = True
        out = tokens.new_empty(len(is_own), *tokens.shape[2:])
        out = out.index_put((is_own.nonzero()[:, 0],), tokens[0])
        return out.index_put(((~is_own).nonzero()[:, 0],), prompt.to(tokens.dtype))[None]

    def insert_value(self, tokens: Tensor, value: int) -> Tensor:
        """`insert` of one value for every virtual token."""
        return self.insert(tokens, tokens.new_full((self.num_virtual_tokens, *tokens.shape[2:]), value))

    def remove(self, tokens: Tensor) -> Tensor:
        """The inverse of `insert`."""
        return tokens[:, self.own]


def insert_each(model: PreTrainedModel, kwargs: dict[str, Any], prompts: Prompts) -> PackedLayout:
    """Puts its own prompt before each sequence of a packed batch, in place."""
    if kwargs.get("token_type_ids") is not None:
        raise NotImplementedError(
            "token_type_ids: none are known for the virtual tokens of a packed batch with several soft prompts; pad "
            "the sequences into rows of their own"
        )
    layout = PackedLayout(kwargs["cu_seq_lens_q"], prompts)
    set_empty_mask(kwargs)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        kwargs[name] = layout.cu_seqlens.to(kwargs[name].dtype) if kwargs.get(name) is not None else None
    longest = int(layout.cu_seqlens.diff().max())
    kwargs.update({name: longest for name in ("max_length_q", "max_length_k") if kwargs.get(name) is not None})
    virtual_positions = torch.cat([torch.arange(count) for count in prompts.counts])
    positions = kwargs["position_ids"]
    kwargs["position_ids"] = layout.insert(positions + layout.per_token, virtual_positions.to(positions.device))
    keep = kwargs.get("logits_to_keep")
    if isinstance(keep, Tensor):
        keep = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        kwargs["logits_to_keep"] = layout.own[torch.where(keep < 0, keep + layout.length, keep)]
    elif kwargs.get("labels") is not None:
        kwargs["labels"] = layout.insert_value(kwargs["labels"], -100)
    starts = prompts.table_starts()
    places = [torch.arange(count) + starts[i] for i, count in zip(prompts.index, prompts.counts, strict=True) if count]
    embed: Any = model.get_input_embeddings()
    embeds, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids")
    if embeds is None:
        assert ids is not None
        check_range(ids, embed.weight.shape[0])
        embeds = embed(ids)
    table = prompts.table.to(device=embeds.device, dtype=embeds.dtype)
    kwargs["inputs_embeds"] = layout.insert(embeds, table[torch.cat(places).to(embeds.device)])
    kwargs["input_ids"] = None
    mark_inserted(kwargs["inputs_embeds"])
    return layout
