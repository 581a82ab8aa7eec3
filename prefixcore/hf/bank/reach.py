"""The decoder's attention becomes ours, once: through transformers' attention interface, or through its cache."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from ...ops import which_backend
from ..attention.disabled import disable
from ..attention.discover import check_reached
from ..attention.discover_cached import cache_name
from ..attention.interface import ATTENTION, PREFIXES, NoArgumentsError
from ..attention.patch import frozen_run
from ..attention.prefix import KeyValue, PrefixCall
from ..families import is_known, text_config
from ..model.devices import device_of
from ..model.sample_inputs import reads_tokens, sample_inputs
from ..model.signature import argument_names, takes_keywords
from ..positions.decoder_positions import position_module
from ..positions.model_inputs import plain_ids
from .attached import Attached
from .cached_calls import reach_cached

if TYPE_CHECKING:
    from .bank import Bank


def reach(bank: Bank) -> None:
    """Lets the decoder's attention run through ours, once."""
    if bank.is_reached or isinstance(bank.decoder, str):
        return
    decoder = bank.decoder
    if bank.cache_layers:
        bank.cache_name, bank.takes_positions = cache_name(decoder) or "", "position_ids" in argument_names(decoder)
        if not bank.takes_positions:
            bank.positions = position_module(decoder)
            _wrap_positions(bank)
        reach_cached(bank)
        _wrap_decoder(bank, decoder)
        return
    bank.patch.set_attention(decoder if bank.encoder is None else bank.model, ATTENTION)
    check_reached(decoder, bank.layers)
    bank.patch.number_layers(bank.layers, True)
    _wrap_positions(bank)
    is_given = is_known(bank.model) or bank.encoder is not None
    bank.hands_on_arguments = is_given or _find_handed_on(bank, decoder)
    bank.patch.number_layers(bank.layers, bank.hands_on_arguments)
    _wrap_decoder(bank, decoder)


def _wrap_positions(bank: Bank) -> None:
    if bank.positions is not None:
        bank.names[bank.positions] = argument_names(bank.positions)
        bank.patch.wrap_forward(bank.positions, bank.call_positions)


def _wrap_decoder(bank: Bank, decoder: PreTrainedModel) -> None:
    if decoder not in bank.patch.forwards:
        bank.names[decoder] = argument_names(decoder)
        bank.patch.wrap_forward(decoder, bank.call_decoder)
    bank.is_reached = True


def _find_handed_on(bank: Bank, decoder: PreTrainedModel) -> bool:
    """Whether each attention layer gets the arguments that the decoder is called with."""
    if not takes_keywords(decoder):
        return False
    recorded: dict[int, KeyValue] = {}
    inputs = sample_inputs(decoder, plain_ids(bank.model, 1) if reads_tokens(decoder) else torch.empty(0))
    # Disabled: what is attached before a first prefix is none of this call's, nor are the rows that it would name.
    with frozen_run(bank.model), disable(bank.patch), suppress(NoArgumentsError):
        decoder(**inputs, **{PREFIXES: PrefixCall([], recorded=recorded)})
    return len(recorded) == len(bank.layers)


def has_kernel(bank: Bank) -> bool:
    """Whether there is a kernel for the decoder's attention where it stands now, so that batches may be packed.

    The model keeps its own attention until a first call needs ours, so its dtype and device may still change.
    """
    if isinstance(bank.decoder, str):
        return False
    try:
        choice = which_backend("prefix_attention", device_of(bank.decoder), bank.decoder.dtype)
    except (ValueError, RuntimeError):  # a backend is forced that has no attention, or nothing is compiled
        return False
    return choice.name != "reference" or choice.why == "forced"


def check_concatenated(bank: Bank, adapter: Attached) -> None:
    """Raises NotImplementedError for a prefix that concatenation with keys and values cannot make.

    In some layers of a model whose layers share a mask that shows it, or with the text at position 0 where the
    model counts positions, or biases by distance, from the keys that its cache has.
    """
    if not bank.cache_layers or isinstance(bank.decoder, str):
        return
    takes_positions = "position_ids" in argument_names(bank.decoder) and not getattr(
        text_config(bank.model), "alibi", False
    )
    if not adapter.shift and not takes_positions:
        raise NotImplementedError(
            f"{type(bank.model).__name__} counts where a token stands from all keys before it, those of the prefix "
            "among them, and cannot be told otherwise: leave position_offset=False out"
        )
    if set(adapter.layers or ()) != set(range(len(bank.layers))):
        raise NotImplementedError(
            f"{type(bank.model).__name__} has attention of its own, to which a prefix is concatenated, in every "
            f"layer or in none (0 to {len(bank.layers) - 1}), got layers={adapter.layers}: leave layers out"
        )
