"""A call of the model with soft prompts: computed once for all rows, or put into each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..attention.prefix import LayerPrefixes
from ..attention.refusals import refuse_attention_weights, refuse_other_attention, refuse_unshareable, warn_of_dropout
from ..batch.layout import Layout
from ..batch.tasks import Rows, Task
from ..families import has_windows, is_known, text_config
from ..positions.cache import (
    CacheLabel,
    cache_argument,
    cache_length,
    cache_output,
    close_cache,
    counts_tokens,
    get_label,
    label_to_continue,
    open_cache,
    set_label,
)
from ..positions.model_inputs import SEQUENCE, has_axes, head_of, text_positions
from ..positions.positions import batch_rows, past_length, query_length
from ..positions.row_padding import check_rows_may_differ
from ..prompts.packed_prompt import insert_each, insert_shared
from ..prompts.placed_prompt import place
from ..prompts.prompt_arguments import check_arguments, check_positions, tokens
from ..prompts.prompt_embeddings import in_place_of_stand_ins
from ..prompts.prompts import Prompts
from ..prompts.soft_prompt import continue_after, insert, without_prompt
from .cpt_calls import AnswersLoss
from .prefix_calls import compute_once, prompt_of
from .reach import reach

if TYPE_CHECKING:
    from .bank import Bank


WORTH = {"cpu": 2**15, "gpu": 2**22}
"""From how many saved tokens times the hidden size on a second pass over the layers is quicker than longer rows."""


def place_prompts(
    bank: Bank, kwargs: dict[str, Any], rows: Rows, *, in_rows: bool = False
) -> tuple[dict[Task, LayerPrefixes | None], dict[Task, Tensor]]:
    """Which soft prompts of a call become prefixes, computed once for all rows, and what is put into each row.

    The model is causal, so the virtual tokens of a soft prompt do not depend on the text, and are to it what a
    prefix is. The cache then holds the text alone. With labels the last virtual token goes into each row, as the
    first token of the text is predicted from it; `in_rows`: all are wanted there.

    Returns:
        The prefixes, None for one that the cache holds; and the embeddings [P, E] of what is put in, nothing where the
        call goes on from a cache.
    """
    label = None
    if batch_rows(kwargs) == 0:
        got = list(tokens(kwargs).shape)
        raise ValueError(f"the batch has no rows ({got}): give at least one, as a soft prompt is put into each")
    if query_length(kwargs) == 0:
        raise ValueError("the rows have no tokens: give at least one, as a soft prompt stands before a text")
    if kwargs.get("cu_seq_lens_q") is None:
        label = label_to_continue(cache_argument(kwargs), rows.keys(batch_rows(kwargs)))
    if label is not None:
        return {task: None for task in rows.prompts if task.key() in label.order}, {}
    prompts = {task: prompt_of(bank, task) for task in rows.prompts}
    trains = torch.is_grad_enabled() and any(task.adapter.trains for task in rows.prompts)
    if in_rows or not _may_compute_once(bank, kwargs, max(map(len, prompts.values())), trains):
        return {}, prompts
    if not bank.is_reached and trains:
        warn_of_dropout(bank.model)
    reach(bank)
    assert isinstance(bank.decoder, PreTrainedModel)
    refuse_other_attention(bank.decoder)
    last = 0 if kwargs.get("labels") is None or head_of(bank.model) == SEQUENCE else 1
    shared = {task: prompt[: len(prompt) - last] for task, prompt in prompts.items() if len(prompt) > last}
    inserted = {task: prompt[len(prompt) - last :] for task, prompt in prompts.items()} if last else {}
    return {task: compute_once(bank, prompt) for task, prompt in shared.items()}, inserted


def reach_before_masks(bank: Bank, kwargs: dict[str, Any]) -> None:
    """Lets attention be ours before the masks of a static cache are made, where soft prompts become prefixes.

    Made for the attention that the model had, they may be none where ours needs one: to SDPA none means that the unused
    keys at the end of the cache are not looked at, to ours that the last query stands at the last key.
    """
    if not getattr(cache_argument(kwargs), "is_compileable", False):
        return
    before_text = (a for a in list(bank.adapters.values()) if not a.is_prefix and a.virtual_token_ids is None)
    if _can_compute_once(bank) and any(before_text):
        reach(bank)


def keep_new_text(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Has generate keep all of a text that its cache does not hold, in place: it takes virtual tokens for some of it.

    Where it goes on from a cache it keeps as many tokens as the text has more than the cache; in its later steps, one.
    """
    cache, kept = cache_argument(kwargs), kwargs.get("next_sequence_length")
    label = get_label(cache)
    if label is None or not label.slots or kept is None or not counts_tokens(cache):
        return
    embeds = kwargs.get("inputs_embeds")
    text = (*args, kwargs.get("input_ids"))[0] if embeds is None else embeds
    if text is not None and kept == text.shape[1] - cache_length(cache):
        kwargs["next_sequence_length"] = kept + label.slots


def place_prompts_in_text(bank: Bank, forward: Callable[..., Any], kwargs: dict[str, Any], rows: Rows) -> Any:
    """Puts soft prompts where special ids stand for them, in place; `forward` for a call that then labels its cache."""
    num_rows, cu_seqlens = batch_rows(kwargs), kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None and len(rows.tasks) + (rows.index is not None) > 1:
        raise NotImplementedError(
            "virtual_token_ids: packed sequences with several soft prompts that stand in the text; pad them into rows"
        )
    past = past_length(kwargs)
    label = None if cu_seqlens is not None else label_to_continue(cache_argument(kwargs), rows.keys(num_rows))
    index = rows.of(rows.placed, num_rows) if cu_seqlens is None else [0]
    prompts = Prompts([prompt_of(bank, task) for task in rows.placed], index)
    ids_of: list[Any] = [task.adapter.virtual_token_ids for task in rows.placed]
    if cu_seqlens is not None and isinstance(ids_of[0], int):
        raise NotImplementedError(
            "virtual_token_ids: in packed sequences one id cannot stand for all virtual tokens; give one for each"
        )
    starts = label is None and not past
    place(bank.model, kwargs, prompts, ids_of, starts)
    if cu_seqlens is not None:
        return forward
    return lambda **kwargs: call_labelled(forward, kwargs, rows, [0] * num_rows, starts=starts)


def _can_compute_once(bank: Bank) -> bool:
    """Whether soft prompts can be prefixes in this model."""
    return not isinstance(bank.decoder, str) and is_known(bank.model) and bank.only_full_attention


def _may_compute_once(bank: Bank, kwargs: dict[str, Any], longest: int, trains: bool) -> bool:
    """Whether soft prompts of a call that starts sequences can be computed once, and it is worth it."""
    decoder: Any = bank.decoder
    if not _can_compute_once(bank) or torch.compiler.is_compiling():
        return False
    if kwargs.get("cu_seq_lens_q") is not None or kwargs.get("token_type_ids") is not None:
        return False  # a packed batch does it in one pass; types of tokens come from each row's text
    for option in ("output_attentions", "output_router_logits"):
        if kwargs.get(option) or getattr(decoder.config, option, False):
            return False
    if trains and bank.checkpoints:
        return False  # layers that are repeated would leave their keys a second time
    if trains or not _uses_cache(bank.model, kwargs):
        # A second pass costs its launches: what it saves has to be more. A cache without virtual tokens is worth it.
        saved = (batch_rows(kwargs) - 1) * longest * text_config(bank.model).hidden_size
        if saved < WORTH.get(tokens(kwargs).device.type, WORTH["gpu"]):
            return False
    return _start_at_zero(kwargs)


def call_with_prompts(
    bank: Bank,
    forward: Callable[..., Any],
    kwargs: dict[str, Any],
    rows: Rows,
    prompts: dict[Task, Tensor],
    answers: AnswersLoss | None = None,
) -> Any:
    """A call of the model with soft prompts put into its input, and taken out of its output.

    `answers`: the loss to compute from all logits, in place of the model's own.
    """
    check_arguments(kwargs, has_axes(bank.model))
    cache, num_rows, packed = cache_argument(kwargs), batch_rows(kwargs), kwargs.get("cu_seq_lens_q") is not None
    if bank.is_reached:
        assert isinstance(bank.decoder, PreTrainedModel)
        refuse_attention_weights(bank.decoder, kwargs)
    past, length = past_length(kwargs), tokens(kwargs).shape[1]
    label = None if packed else label_to_continue(cache, rows.keys(num_rows))
    layout: Any = None
    placed = Prompts([], [])
    if label is not None or (past and not packed):
        counts = rows.counts(list(prompts), num_rows) if label is None else label.inserted_of(num_rows)
        first = 0 if label is None else label.first_position
        names = bank.names[bank.model]
        virtual = max(counts) if label is None else label.slots
        continue_after(bank.model, names, kwargs, counts, past, _may_read(kwargs, cache), first, virtual)
        needed = int(past) + length
    else:
        placed = Prompts(list(prompts.values()), rows.of(list(prompts), num_rows))
        counts = placed.counts
        first = _first_position(bank.model, kwargs)
        if packed:
            layout = _insert_packed(bank, kwargs, rows, placed, int(past))
        else:
            if len(set(counts)) > 1 and not torch.compiler.is_compiling():
                check_rows_may_differ(bank)
            layout = insert(bank.model, bank.names[bank.model], kwargs, placed, bank.first_position)
        needed = placed.longest + length
    check_positions(kwargs, max(counts), needed, bank.limit)
    with in_place_of_stand_ins(bank.model, layout, placed):
        output = call_labelled(forward, kwargs, rows, counts, starts=layout is not None and not packed, first=first)
    if answers is not None:
        output = answers.put(output, layout)
    # The logits [B, labels] of a head for sequences are no tokens, whatever their number.
    keep = ("logits",) if head_of(bank.model) == SEQUENCE else ()
    return output if layout is None else without_prompt(output, layout, keep)


def call_labelled(
    forward: Callable[..., Any],
    kwargs: dict[str, Any],
    rows: Rows,
    inserted: list[int],
    *,
    starts: bool,
    first: int = 0,
) -> Any:
    """A call whose cache holds virtual tokens of soft prompts: it may be written to, and is labelled if it `starts`."""
    cache = cache_argument(kwargs)
    open_cache(cache)
    try:
        output = forward(**kwargs)
        cache = cache_output(output) if cache is None else cache
        if starts and isinstance(cache, Cache) and not torch.compiler.is_compiling():
            label = CacheLabel.inserting(get_label(cache), rows.keys(len(inserted)), rows, inserted)
            label.first_position = first
            set_label(cache, label)
        return output
    finally:
        close_cache(cache)


def _insert_packed(bank: Bank, kwargs: dict[str, Any], rows: Rows, prompts: Prompts, past: int) -> Any:
    """Puts the soft prompts into a packed batch: one before all sequences, or each before its own."""
    batch_size = tokens(kwargs).shape[0]
    if batch_size != 1 or past:
        got = f"{batch_size} rows" if batch_size != 1 else f"a cache of {past} tokens"
        raise ValueError(f"expected one row and an empty cache in a packed batch (cu_seq_lens_q), got {got}")
    decoder = bank.decoder
    if isinstance(decoder, str):
        raise NotImplementedError(
            f"{type(bank.model).__name__} cannot be given packed batches (cu_seq_lens_q) with a soft prompt: "
            f"{decoder}; pad the sequences into rows of their own"
        )
    refuse_attention_weights(decoder, kwargs)
    kwargs.pop("seq_idx", None)  # cu_seq_lens_q says the same, and known families read it alone
    if not bank.is_reached and any(task.adapter.trains for task in rows.prompts):
        warn_of_dropout(bank.model)
    reach(bank)
    refuse_other_attention(decoder)
    if not prompts.is_one:
        return insert_each(bank.model, kwargs, prompts)
    refuse_unshareable(decoder, kwargs)
    if has_windows(decoder) and prompts.index:  # read once here, and not in each layer: it makes a GPU wait
        kwargs["max_length_q"] = int(kwargs["cu_seq_lens_q"].diff().max())
    return insert_shared(bank.model, kwargs, prompts)


def _first_position(model: PreTrainedModel, kwargs: dict[str, Any]) -> int:
    """Where the first token of a call with a cache stands, as far as it is told; 0 otherwise."""
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is None or cache_argument(kwargs) is None or kwargs.get("cu_seq_lens_q") is not None:
        return 0
    counted = text_positions(model, positions)
    if counted is None or torch.compiler.is_compiling():
        return 0
    (batch_size, length) = tokens(kwargs).shape[:2]
    layout = Layout.from_mask(mask, batch_size, length, 0)
    return int(layout.first_of_text(counted.expand(batch_size, -1)).min())


def _start_at_zero(kwargs: dict[str, Any]) -> bool:
    """Whether each text begins at position 0; the prompt stands before it wherever that is."""
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is None:
        return True
    if positions.dim() != 2:
        return False
    length = tokens(kwargs).shape[1]
    if mask is None:
        return not bool(positions[:, 0].any()) and not bool((positions.diff(dim=-1) < 0).any())
    if not isinstance(mask, Tensor) or mask.dim() != 2:  # made by generate for a static cache, as the positions were
        return not bool(positions.amin(-1).any())
    positions = positions.expand(mask.shape[0], -1)
    return not bool(Layout.from_mask(mask, mask.shape[0], length, 0).first_of_text(positions).any())


def _uses_cache(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    use_cache = kwargs.get("use_cache")
    return cache_argument(kwargs) is not None or bool(text_config(model).use_cache if use_cache is None else use_cache)


def _may_read(kwargs: dict[str, Any], cache: Any) -> bool:
    """Whether to read the values of positions, which makes a GPU wait: not in each step of a plain generate."""
    on_cpu = tokens(kwargs).device.type == "cpu"
    return on_cpu or query_length(kwargs) > 1 or getattr(cache, "_is_user_defined", False)
