"""The check that a model of an unknown family has to pass before anything is attached to it.

A prefix made of the keys and values of a text, or a prompt made of its embeddings, must have the effect of the text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..nn import Prefix, PrefixTuningConfig, PromptTuningConfig, SoftPrompt
from .attached import Attached
from .bank import Bank
from .discover import AttentionCall, record
from .families import known_families, text_config
from .patch import frozen_run

_TEXT, _CONTINUATION = 3, 4
"""How many tokens become virtual ones, and how many follow them."""

_TOLERANCE = 0.05
"""The share of the text's effect that may be missing. Rounding in bfloat16 takes about a hundredth."""


def verify_prefix(model: PreTrainedModel, backbone: PreTrainedModel, calls: list[AttentionCall]) -> None:
    """Raises NotImplementedError unless a prefix on these layers acts as the text it was made of."""
    ids = _probe_ids(model)
    found = record(model, ids[:, :_TEXT])
    initial = [(call.key[0], call.value[0]) for call in found]
    module = Prefix([call.shape for call in calls], PrefixTuningConfig(init=initial), initial).to(model.device)

    def run(tokens: Tensor) -> Tensor:
        with frozen_run(model):
            return backbone(input_ids=tokens, use_cache=False)[0]

    expected, without = run(ids)[:, _TEXT:], run(ids[:, _TEXT:])
    bank = Bank(model)
    try:
        bank.set_decoder(backbone, calls)
        bank.add(Attached(module, range(len(calls))))
        got = run(ids[:, _TEXT:])
    finally:
        bank.patch.undo()
    _compare(model, "prefix", expected, got, without)


def verify_soft_prompt(model: PreTrainedModel, hidden_size: int) -> None:
    """Raises NotImplementedError unless a soft prompt acts as the text whose embeddings it has."""
    ids = _probe_ids(model)

    def run(tokens: Tensor) -> Tensor:
        with frozen_run(model):
            return model(input_ids=tokens, use_cache=False)[0]

    with frozen_run(model):
        initial = model.get_input_embeddings()(ids[0, :_TEXT]).float()
    module = SoftPrompt(hidden_size, PromptTuningConfig(init=initial), initial).to(model.device)
    expected, without = run(ids), run(ids[:, _TEXT:])
    if expected.shape[:2] != ids.shape:
        raise NotImplementedError(
            f"{type(model).__name__} does not return one output a token ({list(expected.shape)}), which a soft prompt "
            f"needs so far; known families: {known_families()}"
        )
    bank = Bank(model)
    try:
        bank.add(Attached(module))
        got = run(ids[:, _TEXT:])
    finally:
        bank.patch.undo()
    _compare(model, "soft prompt", expected[:, _TEXT:], got, without)


def _probe_ids(model: PreTrainedModel) -> Tensor:
    """[1, 7] ids spread evenly over the vocabulary."""
    count = _TEXT + _CONTINUATION
    vocabulary = text_config(model).vocab_size
    ids = torch.arange(1, count + 1, device=model.device) * vocabulary // (count + 1)
    return ids.clamp(max=vocabulary - 1).unsqueeze(0)


def _compare(model: PreTrainedModel, what: str, expected: Tensor, got: Any, without: Tensor) -> None:
    """Raises NotImplementedError if `got` is not `expected`, measured by how far `without` the text is from it."""
    effect = (expected - without).float().norm()
    missing = (expected - got).float().norm()
    if not missing <= _TOLERANCE * effect:
        raise NotImplementedError(
            f"a {what} on {type(model).__name__} does not act as the text it was made of (off by {float(missing):.3g}, "
            f"where the text changes the output by {float(effect):.3g}), so this family is not supported; known "
            f"families: {known_families()}"
        )
