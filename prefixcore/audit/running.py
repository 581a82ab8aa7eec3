"""Runs of the frozen model with virtual tokens laid in by hand, in which attention can be watched.

A measure that looks inside (attention weights, a prefix with one virtual token taken out) does not go through an
attached model: here nothing is hidden, positions are given, and what is computed is the reference's definition. The
audit compares these runs with the attached model and says by how much they differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..hf.attention.interface import attend_to_prefix_and_sequence
from ..hf.attention.mask import prefix_mask
from ..hf.attention.patch import frozen_run
from ..hf.attention.prefix import PrefixCall
from ..hf.model.signature import argument_names
from .errors import NotMeasuredError
from .virtual import VirtualTokens

WATCHED = "prefixcore_audit"
"""The name of the attention function of these runs."""


@dataclass(frozen=True)
class WatchedCall:
    """One layer's attention in a run.

    Attributes:
        layer: which of the model's attention layers.
        query: [B, H, T, D].
        key, value: [B, Hkv, S, D] and [B, Hkv, S, Dv].
        prefix: the layer's key [Hkv, P, D] and value [Hkv, P, Dv]; None: it has none.
        mask: None, a padding mask [B, S], or what says everything [B, 1, T, S].
        options: the op's: is_causal, scale, sliding_window, softcap, sinks.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    prefix: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    options: dict[str, Any]


Watch = Callable[[WatchedCall], None]


class _Run:
    def __init__(self, virtual: VirtualTokens | None, watch: Watch | None) -> None:
        self.pairs = {} if virtual is None else virtual.pairs
        self.watch = watch
        self.layer = 0


_run: ContextVar[_Run | None] = ContextVar("prefixcore_audit_run", default=None)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    run = _run.get()
    assert run is not None, "the audit's attention runs inside a FrozenRun alone"
    layer, run.layer = run.layer, run.layer + 1
    pair = run.pairs.get(layer)
    if pair is not None and pair[0].shape[1] == 0:
        pair = None
    if run.watch is not None:
        options = _options(module, query, attention_mask, kwargs)
        run.watch(WatchedCall(layer, query, key, value, pair, attention_mask, options))
    prefixes = None if pair is None else PrefixCall([pair])
    return attend_to_prefix_and_sequence(module, 0, prefixes, query, key, value, attention_mask, **kwargs)


def _options(module: nn.Module, query: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The op's options of a call, as `attend_to_prefix_and_sequence` makes them."""
    is_causal, window = kwargs.get("is_causal"), kwargs.get("sliding_window")
    if mask is not None and mask.dim() == 4:
        is_causal, window = False, None
    elif is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    scale = kwargs.get("scaling")
    return {
        "is_causal": is_causal,
        "scale": 1 / math.sqrt(query.shape[3]) if scale is None else scale,
        "sliding_window": window,
        "softcap": kwargs.get("softcap"),
        "sinks": kwargs.get("s_aux"),
    }


AttentionInterface.register(WATCHED, _attend)
AttentionMaskInterface.register(WATCHED, prefix_mask)


class FrozenRun:
    """Runs a frozen model, to which nothing is attached, with virtual tokens or without.

    Args:
        model: the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._takes_positions = "position_ids" in argument_names(model)

    def __call__(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        virtual: VirtualTokens | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """The logits [B, T, V] at the tokens of the text.

        Args:
            ids: [B, T], padded on the right.
            mask: [B, T], 1 = token; None: all are.
            virtual: what stands before the text of every row.
            watch: is given each layer's attention before it is computed.

        Raises:
            NotMeasuredError: the model takes no positions, or its attention is not run by transformers' interface.
        """
        if not self._takes_positions:
            raise NotMeasuredError(f"{type(self.model).__name__} takes no positions, so the text cannot be placed")
        rows, length = ids.shape
        mask = torch.ones_like(ids) if mask is None else mask
        first = 0 if virtual is None else virtual.text_position
        positions = torch.arange(length, device=ids.device) + first
        inputs: dict[str, Any] = {"input_ids": ids}
        before = 0
        if virtual is not None and virtual.prompt is not None:
            before = len(virtual.places)
            embed: Any = self.model.get_input_embeddings()
            prompt = virtual.prompt.to(embed.weight.dtype).to(embed.weight.device)
            with torch.no_grad():
                inputs = {"inputs_embeds": torch.cat([prompt.expand(rows, -1, -1), embed(ids)], 1)}
            mask = torch.cat([mask.new_ones(rows, before), mask], 1)
            positions = torch.cat([torch.tensor(virtual.places, device=ids.device, dtype=torch.long), positions])
        run = _Run(virtual, watch)
        token = _run.set(run)
        try:
            with frozen_run(self.model, WATCHED):
                output: Any = self.model(
                    **inputs, attention_mask=mask, position_ids=positions.expand(rows, -1), use_cache=False
                )
        finally:
            _run.reset(token)
        if run.layer == 0 and (watch is not None or run.pairs):
            raise NotMeasuredError(
                f"{type(self.model).__name__} does not run its attention through transformers' attention interface"
            )
        logits: Tensor = output.logits
        return logits[:, before:]
