"""A call of the decoder: its layers get the prefixes of the rows, and positions move behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..attention.interface import PREFIXES
from ..attention.prefix import KeyValue, LayerPrefixes, PrefixCall, running, stack
from ..attention.refusals import refuse_attention_weights, refuse_other_attention, refuse_reentrant_checkpointing
from ..batch.packing import is_empty_mask, lengths_of, set_empty_mask
from ..batch.tasks import Task
from ..families import is_known
from ..model.devices import device_of
from ..model.sample_inputs import model_input, reads_tokens
from ..model.tensor_parallel import own_heads
from ..positions.cache import (
    CacheLabel,
    cache_argument,
    cache_output,
    close_cache,
    label_to_continue,
    open_cache,
    set_label,
)
from ..positions.decoder_positions import moved
from ..positions.positions import batch_rows, check_limit, is_packed, past_length, query_length, shift_positions
from ..prompts.prompt_arguments import tokens
from .cached_calls import compute_once_cached, forward_cached
from .evaluate import evaluate
from .handed import RowPrefixes, pop_handed
from .inserted import check_inserted
from .rows import pop_rows

if TYPE_CHECKING:
    from .bank import Bank


def decode(bank: Bank, forward: Callable[..., Any], **kwargs: Any) -> Any:
    """A call of the decoder, whose layers get their prefixes."""
    decoder: Any = bank.decoder
    if bank.encoder is not None and (kwargs.get("input_ids") is None) == (kwargs.get("inputs_embeds") is None):
        raise ValueError(
            f"{type(bank.model).__name__} needs either decoder_input_ids or decoder_inputs_embeds, or labels, which "
            "its decoder's input is made of"
        )
    given: RowPrefixes | None = pop_handed(kwargs)
    from_model = given is not None
    if given is None:
        check_inserted(bank, decoder, kwargs)
        given = RowPrefixes(pop_rows(bank, kwargs), {})
    if bank.encoder is not None:
        from .encoder_calls import behind_prompts, extend_encoder_mask

        extend_encoder_mask(bank, given.rows, kwargs, batch_rows(kwargs))
        if not bank.is_reached:
            return behind_prompts(forward, given.rows, kwargs)
    if not bank.is_reached:
        return forward(**kwargs)
    if not bank.cache_layers:
        refuse_other_attention(decoder)
    tasks = [task for task in given.tasks if not _is_of_encoder(bank, task)]
    if given.rows.tasks:
        refuse_attention_weights(decoder, kwargs)
    if tasks and decoder.training and torch.is_grad_enabled():
        refuse_reentrant_checkpointing(bank.checkpointable)
        if len(set(bank.layers)) < len(bank.layers) and bank.checkpoints:
            raise NotImplementedError(
                f"the layers of {type(decoder).__name__} share a module, so gradient checkpointing, which repeats them "
                "in the backward in another order, would give them the prefixes of others: turn it off"
            )
    if is_packed(kwargs):
        _keep_sequences_apart(bank, kwargs)
    num_rows, cache = batch_rows(kwargs), cache_argument(kwargs)
    if given.rows.index is not None and len(given.rows.index) != num_rows:
        raise NotImplementedError(
            f"{type(bank.model).__name__} makes {num_rows} rows of a batch with task_ids for {len(given.rows.index)}: "
            "give one for all rows"
        )
    keys = given.rows.keys(num_rows)
    label = label_to_continue(cache, keys)
    call = prefixes_of_call(bank, given, tasks, num_rows, label, _input_device(bank, kwargs))
    if kwargs.get("cu_seq_lens_q") is not None and not is_empty_mask(kwargs.get("attention_mask")):
        set_empty_mask(kwargs)
    shifts = label.order if label is not None else {task.key(): given.shift(task) for task in tasks}
    if (tasks or from_model) and bank.moves_positions and bank.takes_positions:
        counts = [shifts.get(key, 0) if key else 0 for key in keys]
        shift_positions(kwargs, _shift(bank, counts, kwargs), bank.limit, bank.first_position)
        if bank.is_hybrid and kwargs["position_ids"].dim() == 2:  # Qwen4-Exp looks them up by row
            kwargs["position_ids"] = kwargs["position_ids"].expand(num_rows, -1)
    open_cache(cache)
    try:
        with moved(_decoder_counts(bank, tasks, given, num_rows, kwargs)):
            output = _forward(bank, forward, kwargs, call)
    finally:
        close_cache(cache)
    cache = cache_output(output) if cache is None else cache
    # A decoder alone has its soft prompts in the cache itself, which says so already. No bool() of a list: torch 2.10
    # compiles none.
    is_behind = tasks or (bank.encoder is not None and given.rows.tasks)
    if label is None and is_behind and isinstance(cache, Cache) and kwargs.get("cu_seq_lens_q") is None:
        set_label(cache, CacheLabel(keys, given.rows, shifts, call.detached(), [0] * num_rows))
        close_cache(cache)
    return output


def _keep_sequences_apart(bank: Bank, kwargs: dict[str, Any]) -> None:
    """Sees to it that packed sequences are known by more than positions that restart, which only some masks heed."""
    if bank.is_hybrid:
        raise NotImplementedError(
            f"{type(bank.decoder).__name__} has other layers than attention, which would remember the sequences "
            "before, so sequences cannot be packed: pad them into rows of their own"
        )
    if kwargs.get("cu_seq_lens_q") is not None:
        return
    if is_known(bank.model) and tokens(kwargs).shape[0] == 1:
        kwargs.update(lengths_of(kwargs["position_ids"]))
    elif bank.model.can_generate():
        kwargs["use_cache"] = False  # with a cache transformers looks for no positions that restart


def _forward(bank: Bank, forward: Callable[..., Any], kwargs: dict[str, Any], call: PrefixCall) -> Any:
    """A forward of the decoder, whose layers find the prefixes of `call`."""
    if bank.cache_layers:
        return forward_cached(bank, forward, kwargs, call)
    if bank.hands_on_arguments:
        return forward(**kwargs, **{PREFIXES: call})
    decoder: Any = bank.decoder
    if kwargs.get("cu_seq_lens_q") is not None:
        raise NotImplementedError(
            f"{type(decoder).__name__} hands no arguments on to its layers, so sequences cannot be packed: pad them "
            "into rows of their own"
        )
    if decoder.training and torch.is_grad_enabled() and bank.checkpoints:
        raise NotImplementedError(
            f"{type(decoder).__name__} hands no arguments on to its layers, so gradient checkpointing, which repeats "
            "them in the backward, would leave the prefix out: turn it off"
        )
    with running(call):
        return forward(**kwargs)


def _decoder_counts(
    bank: Bank, tasks: list[Task], given: RowPrefixes, num_rows: int, kwargs: dict[str, Any]
) -> list[int]:
    """By how much the decoder of an encoder-decoder moves the positions of each row; nothing elsewhere."""
    if bank.positions is None or not tasks:
        return []
    own = {task for task in tasks if bank.decoder_layers.intersection(task.adapter.layers or ())}
    counts = [tasks[i].adapter.shift if i >= 0 and tasks[i] in own else 0 for i in given.rows.of(tasks, num_rows)]
    most, limit = max(counts, default=0), bank.limit
    if limit is not None and most:
        past = past_length(kwargs)
        if isinstance(past, int):
            check_limit(past + query_length(kwargs) + most, most, limit)
    return counts


def _is_of_encoder(bank: Bank, task: Task) -> bool:
    """Whether a prefix is in the encoder alone."""
    layers = task.adapter.layers
    return layers is not None and bank.encoder_layers.issuperset(layers)


def _input_device(bank: Bank, kwargs: dict[str, Any]) -> torch.device:
    """Where what the call reads is; ValueError: it reads nothing, or ids and embeddings at once."""
    assert isinstance(bank.decoder, PreTrainedModel)
    if reads_tokens(bank.decoder) or bank.encoder is not None:
        return tokens(kwargs).device
    given = model_input(kwargs)
    if given is None:
        raise ValueError(f"{type(bank.decoder).__name__} needs {bank.decoder.main_input_name}")
    device: torch.device = given.device
    return device


def _shift(bank: Bank, counts: list[int], kwargs: dict[str, Any]) -> int | Tensor:
    """By how much the positions of each row move: one number for all, or [B, 1], packed [1, T]."""
    if len(set(counts)) <= 1:
        return counts[0] if counts else 0
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    device = tokens(kwargs).device
    shift = torch.tensor(counts, device=device)
    return shift[:, None] if cu_seqlens is None else shift.repeat_interleave(cu_seqlens.diff().to(device))[None]


def prefixes_of_call(
    bank: Bank, given: RowPrefixes, tasks: list[Task], num_rows: int, label: CacheLabel | None, device: torch.device
) -> PrefixCall:
    """The prefixes that the call's layers see; those of the cache, where it holds a sequence behind them.

    Evaluated anew for each sequence, so that a change of the parameters by whatever means is seen.
    """
    if not tasks:
        return PrefixCall([])
    trains = torch.is_grad_enabled() and any(task.adapter.trains for task in tasks)
    if label is not None and label.prefixes is not None and not trains:
        return label.prefixes_for(given.rows.keys(num_rows))
    prefixes = [given.computed.get(task) or _evaluated_once(bank, given, task) for task in tasks]
    index = given.rows.of(tasks, num_rows)
    if len(tasks) == 1 and min(index, default=0) >= 0:
        return PrefixCall(prefixes[0])
    return stack(prefixes, index, device)


def _evaluated_once(bank: Bank, given: RowPrefixes, task: Task) -> LayerPrefixes:
    """The keys and values of a task, which both stacks of an encoder-decoder see in one call."""
    if task not in given.evaluated:
        given.evaluated[task] = prefix_of(bank, task)
    return given.evaluated[task]


def prefix_of(bank: Bank, task: Task) -> LayerPrefixes:
    """The keys and values of a task: differentiable where it trains and gradients are recorded."""
    adapter = task.adapter
    if adapter.layers is None:  # a soft prompt whose sequence goes on from a cache, now with gradients
        return compute_once(bank, prompt_of(bank, task))
    by_layer: LayerPrefixes = [None] * len(bank.layers)
    for layer, pair in zip(adapter.layers, evaluate(bank, adapter), strict=True):
        by_layer[layer] = pair
    split = [layer for layer in adapter.layers if bank.head_groups[layer] is not None]
    if split:
        group = bank.head_groups[split[0]]
        assert group is not None
        pairs = [pair for layer in split if (pair := by_layer[layer]) is not None]
        for layer, own in zip(split, own_heads(pairs, group), strict=True):
            by_layer[layer] = own
    return by_layer


def prompt_of(bank: Bank, task: Task) -> Tensor:
    """The embeddings [P, E] of a task."""
    values = evaluate(bank, task.adapter)
    return values[task.number] if values.dim() == 3 else values


def compute_once(bank: Bank, prompt: Tensor) -> LayerPrefixes:
    """The keys and values that the layers compute for a soft prompt [P, E] at positions 0 to P-1.

    None for a layer that does not run (`generate(assistant_early_exit=...)` leaves out the last ones).
    """
    decoder: Any = bank.decoder
    embed: Any = bank.model.get_input_embeddings()
    prompt = prompt.to(device=device_of(embed), dtype=embed.weight.dtype)
    recorded: dict[int, KeyValue] = {}
    forward = bank.patch.forwards[decoder].original
    if bank.cache_layers:
        return [_of_one_dtype(*pair) for pair in compute_once_cached(bank, forward, prompt)]
    inputs = {"inputs_embeds": prompt[None].clone(), "use_cache": False}  # CTRL scales what it is given in place
    _forward(bank, forward, inputs, PrefixCall([], recorded=recorded))
    return [_of_one_dtype(*recorded[layer]) if layer in recorded else None for layer in range(len(bank.layers))]


def _of_one_dtype(key: Tensor, value: Tensor) -> KeyValue:
    """They differ under autocast: rotation is in float32."""
    dtype = torch.promote_types(key.dtype, value.dtype)
    return key.to(dtype), value.to(dtype)
