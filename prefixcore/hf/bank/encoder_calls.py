"""Calls of an encoder-decoder: each of its stacks gets the prefixes of the rows; soft prompts go before the encoder.

The encoder is wrapped, and not the model: `generate` runs it by itself. What it returns is P tokens longer, so the
decoder's mask of it is made longer, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..attention.interface import PREFIXES
from ..attention.prefix import PrefixCall
from ..attention.refusals import refuse_attention_weights, refuse_other_attention, refuse_reentrant_checkpointing
from ..batch.layout import Layout
from ..batch.tasks import Rows
from ..model.sample_inputs import model_input
from ..positions.cache import (
    CacheLabel,
    cache_argument,
    cache_output,
    close_cache,
    label_to_continue,
    open_cache,
    set_label,
)
from ..positions.positions import batch_rows
from ..positions.row_padding import check_rows_may_differ
from ..prompts.prompt_embeddings import in_place_of_stand_ins
from ..prompts.prompts import Prompts, missing_tokens
from ..prompts.soft_prompt import insert, insert_mask
from .handed import ROWS, RowPrefixes
from .prefix_calls import prefixes_of_call, prompt_of
from .rows import pop_rows

if TYPE_CHECKING:
    from .bank import Bank


def encode(bank: Bank, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """A call of the encoder, from the model, from generate or by itself."""
    encoder: Any = bank.encoder
    given = kwargs.pop(ROWS, None) or RowPrefixes(pop_rows(bank, kwargs), {})
    num_rows = batch_rows(kwargs)
    if given.rows.prompts:
        prompts = prompts_of(bank, given.rows, num_rows)
        if len(set(prompts.counts)) > 1 and not torch.compiler.is_compiling():
            check_rows_may_differ(bank)
        layout = insert(encoder, bank.names[encoder], kwargs, prompts)
        forward = partial(_with_stand_ins, encoder, layout, prompts, forward)
    if not bank.is_reached:
        return forward(**kwargs)
    refuse_other_attention(encoder)
    if given.tasks:
        refuse_attention_weights(encoder, kwargs)
        if encoder.training and torch.is_grad_enabled():
            refuse_reentrant_checkpointing(bank.checkpointable)
    tasks = [task for task in given.tasks if bank.encoder_layers.intersection(task.adapter.layers or ())]
    call = prefixes_of_call(bank, given, tasks, num_rows, None, model_input(kwargs).device)
    return forward(**kwargs, **{PREFIXES: call})


def _with_stand_ins(
    encoder: PreTrainedModel, layout: Layout, prompts: Prompts, forward: Callable[..., Any], **kwargs: Any
) -> Any:
    with in_place_of_stand_ins(encoder, layout, prompts):
        return forward(**kwargs)


def prompts_of(bank: Bank, rows: Rows, num_rows: int) -> Prompts:
    """The soft prompts of the rows."""
    return Prompts([prompt_of(bank, task) for task in rows.prompts], rows.of(rows.prompts, num_rows))


def extend_encoder_mask(bank: Bank, rows: Rows, kwargs: dict[str, Any], num_rows: int) -> None:
    """Lets the decoder see the virtual tokens that the encoder read, in place.

    Raises:
        ValueError: what the encoder returned has no virtual tokens.
    """
    states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
    if not rows.prompts or not isinstance(states, Tensor):
        return
    counts = rows.counts(rows.prompts, num_rows)
    longest = max(counts, default=0)
    missing = missing_tokens(counts, states.device, longest)
    if mask is None:
        if missing is None:
            return
        mask = torch.ones(num_rows, states.shape[1] - longest, dtype=torch.long, device=states.device)
    if states.shape[1] != mask.shape[1] + longest:
        raise ValueError(
            f"encoder_outputs hold {states.shape[1]} tokens, expected {mask.shape[1]} of the text and {longest} "
            "virtual ones: they were computed without the soft prompt; let the attached model compute them"
        )
    layout = Layout.from_mask(mask, num_rows, mask.shape[1], longest)
    kwargs["encoder_attention_mask"] = insert_mask(mask, layout, missing)


def behind_prompts(forward: Callable[..., Any], rows: Rows, kwargs: dict[str, Any]) -> Any:
    """A call of a decoder without prefixes, whose cache holds what it read of the encoder: soft prompts, too."""
    keys, cache = rows.keys(batch_rows(kwargs)), cache_argument(kwargs)
    label = label_to_continue(cache, keys)
    open_cache(cache)
    try:
        output = forward(**kwargs)
    finally:
        close_cache(cache)
    cache = cache_output(output) if cache is None else cache
    if label is None and rows.prompts and isinstance(cache, Cache):
        set_label(cache, CacheLabel(keys, rows, {}, PrefixCall([]), [0] * len(keys)))
        close_cache(cache)
    return output


def find_encoder(model: PreTrainedModel) -> PreTrainedModel | None:
    """The encoder of an encoder-decoder; None: the model is none."""
    if not model.config.is_encoder_decoder:
        return None
    encoder: PreTrainedModel = model.get_encoder()
    return encoder
