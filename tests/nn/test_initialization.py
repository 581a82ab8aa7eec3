"""Starts: PEFT's layout, draws that a seed fixes, and tensors that are refused."""

from __future__ import annotations

import pytest
import torch

from prefixcore.nn import LayerShape, fit_ids, join_layers, split_layers, tensor_init, vocab_ids, vocab_init

SHAPES = [LayerShape(2, 4, 4), LayerShape(1, 8, 3)]


def test_layout_is_layer_then_key_value_then_head():
    shapes = [LayerShape(num_kv_heads=2, key_dim=3, value_dim=3)] * 2
    flat = torch.arange(5 * 24.0).view(5, 24)
    pairs = split_layers(flat, shapes)
    for layer in range(2):
        for kv in range(2):
            for head in range(2):
                place = ((2 * layer + kv) * 2 + head) * 3
                assert torch.equal(pairs[layer][kv][head], flat[:, place : place + 3])
    assert torch.equal(join_layers(pairs), flat)


def test_join_inverts_split_for_layers_that_differ():
    flat = torch.randn(3, 16 + 11)
    pairs = split_layers(flat, SHAPES)
    assert [tuple(t.shape) for pair in pairs for t in pair] == [(2, 3, 4), (2, 3, 4), (1, 3, 8), (1, 3, 3)]
    assert torch.equal(join_layers(pairs), flat)
    with pytest.raises(ValueError, match=r"\[P, 27\]"):
        split_layers(torch.zeros(3, 26), SHAPES)


def test_tensor_init_copies_into_fp32():
    flat = torch.randn(3, 27, dtype=torch.float64)
    pairs = tensor_init(flat, SHAPES)
    assert all(t.dtype == torch.float32 and t.is_contiguous() for pair in pairs for t in pair)
    before = flat.clone()
    pairs[0][0].zero_()
    assert torch.equal(flat, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[:1], "each of 2 layers, got 1"),
        (lambda p: [(p[0][0][:, :2], p[0][1]), p[1]], "key of layer entry 0: expected shape"),
        (lambda p: [p[0], (p[1][0], p[1][1][..., :2])], "value of layer entry 1: expected shape"),
        (lambda p: [p[0], (p[1][0].int(), p[1][1])], "key of layer entry 1: expected floating"),
        (lambda p: [(p[0][0] * float("nan"), p[0][1]), p[1]], "key of layer entry 0: .*NaN"),
        (lambda p: [(p[0][0], p[0][1] + float("inf")), p[1]], "value of layer entry 0: .*infinite"),
    ],
)
def test_tensor_init_refuses(change, message):
    pairs = split_layers(torch.ones(3, 27), SHAPES)
    with pytest.raises(ValueError, match=message):
        tensor_init(change(pairs), SHAPES, 3)


def test_vocab_init_draws_rows_and_leaves_the_global_generator_alone():
    weight = torch.randn(50, 6, dtype=torch.bfloat16)
    before = torch.get_rng_state()
    start = vocab_init(weight, 20, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(start, weight[vocab_ids(50, 20, seed=5)].float())
    assert torch.equal(start, vocab_init(weight, 20, seed=5))
    assert not torch.equal(start, vocab_init(weight, 20, seed=6))


def test_text_is_repeated_or_cut():
    assert fit_ids([1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    assert fit_ids([1, 2, 3], 2) == [1, 2]
    assert fit_ids((1, 2, 3), None) == [1, 2, 3]
    with pytest.raises(ValueError, match="no token"):
        fit_ids([], 4)
