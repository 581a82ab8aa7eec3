"""Tensors whose memory is freed or too small are refused by name, before anything reads them."""

from __future__ import annotations

import pytest
import torch

import prefixcore

from .op_calls import GONE, freed, good

OPTIONAL = {
    "attn_mask": torch.zeros(2, 1, 5, 5), "sinks": torch.zeros(4), "prefix_lengths": torch.tensor([2]),
    "prefix_index": torch.tensor([0, -1]),
}  # fmt: skip
MASKS = {
    "padding": torch.ones(2, 5, dtype=torch.bool), "bool": torch.ones(2, 4, 5, 5, dtype=torch.bool),
    "float64": torch.zeros(2, 1, 5, 5, dtype=torch.float64), "whole": torch.zeros(2, 4, 5, 5),
}  # fmt: skip


@pytest.mark.parametrize("left", [0, 8])
@pytest.mark.parametrize("name", [*good(), *OPTIONAL])
def test_attention_of_freed_memory(backend: str, name: str, left: int) -> None:
    call = good(**OPTIONAL)
    with pytest.raises(ValueError, match=GONE.format(name)):
        prefixcore.prefix_attention(**{**call, name: freed(call[name], left if name not in ("prefix_lengths",) else 0)})


@pytest.mark.parametrize("mask", MASKS)
def test_every_kind_of_mask_whose_memory_is_freed(backend: str, mask: str) -> None:
    with pytest.raises(ValueError, match=GONE.format("(attn_mask|mask|padding)")):
        prefixcore.prefix_attention(**good(attn_mask=freed(MASKS[mask])))


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_autocast_does_not_read_freed_memory(name: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=GONE.format(name)):
        prefixcore.prefix_attention(**good(**{name: freed(good()[name])}))


@pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)
def test_memory_freed_between_forward_and_backward(backend: str) -> None:
    call = good()
    leaf = call["prefix_key"].requires_grad_()
    out = prefixcore.prefix_attention(**call)
    call["key"].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=GONE.format("key")):
        out.sum().backward()
    assert leaf.grad is None


@pytest.mark.parametrize("name", ["input_ids", "weight", "virtual"])
def test_embedding_of_freed_memory(backend: str, name: str) -> None:
    call = {"input_ids": torch.arange(4), "weight": torch.randn(3, 8), "virtual": torch.randn(2, 8)}
    for left in (0, 8):
        with pytest.raises(ValueError, match=GONE.format(name)):
            prefixcore.soft_embedding(**{**call, name: freed(call[name], left)})


def test_memory_that_is_large_enough_is_enough(backend: str) -> None:
    """Views that end where their storage ends, overlapping ones, and empty tensors without any storage."""
    room = torch.randn(2 * 4 * 5 * 8 + 7)
    last = room.as_strided((2, 4, 5, 8), (160, 40, 8, 1), 7)
    overlapping = room.as_strided((2, 2, 5, 8), (0, 3, 1, 1), 2)
    want = prefixcore.prefix_attention(**good(query=last.clone(), key=overlapping.clone()))
    torch.testing.assert_close(prefixcore.prefix_attention(**good(query=last, key=overlapping)), want)
    empty = good(prefix_key=freed(torch.empty(2, 0, 8)), prefix_value=freed(torch.empty(2, 0, 8)))
    assert prefixcore.prefix_attention(**empty).isfinite().all()
