"""transformers 5.24 renamed a call's cache: what goes by the arguments of a forward knows both names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prefixcore.hf.attention.discover import discover, moves_positions
from prefixcore.hf.model.signature import argument_names
from prefixcore.hf.positions.decoder_positions import embed_positions, moved, position_module

from .encoders import make


class _Until(nn.Module):
    def forward(self, input_ids: Tensor, past_key_values_length: int = 0) -> Tensor:
        return torch.arange(input_ids.shape[1])[:, None] + past_key_values_length


class _Since(nn.Module):
    def forward(self, input_ids: Tensor, cache_length: int = 0) -> Tensor:
        return torch.arange(input_ids.shape[1])[:, None] + cache_length


@pytest.mark.parametrize("module", [_Until(), _Since()])
def test_a_decoder_counts_from_what_a_prefix_holds(module: nn.Module) -> None:
    decoder: Any = nn.Module()
    decoder.embed_positions = module
    assert position_module(decoder) is module
    ids, names = torch.zeros(2, 4, dtype=torch.long), argument_names(module)
    with moved([3, 3]):
        assert embed_positions(names, module.forward, (ids,), {}).flatten().tolist() == [3, 4, 5, 6]
        assert embed_positions(names, module.forward, (ids, 2), {}).flatten().tolist() == [5, 6, 7, 8]
    with moved([3, 1]):
        rows = embed_positions(names, module.forward, (ids,), {})
    assert rows[..., 0].tolist() == [[3, 4, 5, 6], [1, 2, 3, 4]]


class _EncoderUntil(nn.Module):
    def forward(self, input_ids: Tensor, position_ids: Any = None, past_key_values: Any = None) -> None: ...


class _EncoderSince(nn.Module):
    def forward(self, input_ids: Tensor, position_ids: Any = None, cache: Any = None) -> None: ...


class _EncoderWithout(nn.Module):
    def forward(self, input_ids: Tensor, position_ids: Any = None) -> None: ...


@pytest.mark.parametrize(
    ("encoder", "moves"), [(_EncoderUntil(), True), (_EncoderSince(), True), (_EncoderWithout(), False)]
)
def test_a_prefix_moves_the_positions_of_an_encoder_with_a_cache(encoder: Any, moves: bool) -> None:
    model = make("bert")
    assert moves_positions(model, encoder, discover(model)) is moves


@pytest.mark.parametrize(("family", "moves"), [("bert", True), ("roberta", True), ("distilbert", False)])
def test_so_do_real_encoders(family: str, moves: bool) -> None:
    model = make(family)
    assert moves_positions(model, model.base_model, discover(model)) is moves
