"""Experiments of the quality suite that are no options of the library: their equations, and what they leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional
from transformers import AttentionInterface

import prefixcore
from bench.quality.outside import FeatureMap, FeatureMapBesidePrefix, Gate, Seen, outside
from bench.quality.rates import scaled_rates
from prefixcore.hf.attention.interface import ATTENTION
from prefixcore.training import Example, TrainingOptions, tokenize, train
from tests import tiny

IDS = torch.arange(10, 28).view(2, 9)
PAIRS = [Example(f"{a}{b} ->", f" {b}{a}\n") for a in "abc" for b in "xyz"]


def seen(dtype: torch.dtype, batch: int = 2, heads: int = 4, kv_heads: int = 2, length: int = 5, dim: int = 8) -> Seen:
    torch.manual_seed(0)
    query, unrotated = torch.randn(2, batch, heads, length, dim, dtype=dtype)
    key, value = torch.randn(2, batch, kv_heads, length, dim, dtype=dtype)
    prefix_key, prefix_value = torch.randn(2, kv_heads, 3, dim, dtype=dtype)
    return Seen(query, unrotated, key, value, (prefix_key, prefix_value), None)


def attached(model, **options):
    config = prefixcore.PrefixTuningConfig(3, init="random", seed=0, position_offset=False, **options)
    return prefixcore.attach(model, config)


def test_a_gate_adds_a_softmax_over_the_prefix_alone():
    given = seen(torch.float64)
    gate = Gate(4, 8, rate=5.0).double()
    with torch.no_grad():
        gate.gate.copy_(torch.tensor([0.0, 0.1, -0.2, 0.3]))
    key, value = (x.repeat_interleave(2, 0) for x in given.prefix)
    weights = torch.softmax(given.query @ key.transpose(-1, -2) / math.sqrt(8), -1)
    factors = torch.tanh(5.0 * gate.gate)[:, None, None]
    torch.testing.assert_close(gate(given), factors * (weights @ value))


def test_what_is_outside_has_right_gradients():
    given = seen(torch.float64, batch=1, length=2, dim=4)
    tensors = [x.requires_grad_() for x in (given.query, given.unrotated, *given.prefix)]
    gate, matrix = Gate(4, 4).double(), FeatureMap(4, 4, rate=0.5).double()
    with torch.no_grad():
        gate.gate.fill_(0.3)
        matrix.matrix.normal_()

    def both(query, unrotated, prefix_key, prefix_value, *_):
        again = given._replace(query=query, unrotated=unrotated, prefix=(prefix_key, prefix_value))
        return gate(again) + matrix(again)

    assert torch.autograd.gradcheck(both, (*tensors, gate.gate, matrix.matrix))


@pytest.mark.parametrize("make", [Gate, FeatureMap])
def test_before_the_first_step_the_model_is_the_bare_model_bit_for_bit(make):
    model = tiny.model()
    with torch.no_grad():
        usual = model(IDS).logits
        with attached(model) as handle:  # the same kernel, to which the prefix is nothing
            model.set_attn_implementation(ATTENTION)
            with outside(handle, make):
                found = model(IDS).logits
        model.set_attn_implementation(ATTENTION)
        bare = model(IDS).logits
    assert torch.equal(found, bare)
    torch.testing.assert_close(found, usual)


def test_a_feature_map_reads_the_query_before_its_rotary_embedding():
    model = tiny.model()
    attention = model.model.layers[0].self_attn
    kept = {}
    attention.q_proj.register_forward_hook(lambda *call: kept.update(query=call[-1]))
    attention.o_proj.register_forward_pre_hook(lambda _, arguments: kept.update(out=arguments[0]))
    with torch.no_grad(), attached(model) as handle, outside(handle, FeatureMap) as matrices:
        model(IDS)
        before = kept["out"]
        matrices[0].normal_()
        model(IDS)
    query = kept["query"].view(2, 9, 4, 16).transpose(1, 2)
    expected = (functional.elu(query) @ matrices[0]).transpose(1, 2).reshape(2, 9, -1)
    torch.testing.assert_close(kept["out"] - before, expected, atol=1e-5, rtol=1e-4)


def test_a_map_beside_the_prefix_leaves_the_prefix_where_it_is():
    model = tiny.model()
    with torch.no_grad(), attached(model) as handle:
        with_prefix = model(IDS).logits
        with outside(handle, FeatureMapBesidePrefix):
            assert torch.equal(model(IDS).logits, with_prefix)
        with outside(handle, FeatureMap):
            assert not torch.allclose(model(IDS).logits, with_prefix)
        assert torch.equal(model(IDS).logits, with_prefix)


@pytest.mark.parametrize("packed", [True, False])
def test_what_is_outside_learns_and_is_gone_afterwards(packed):
    model = tiny.model()
    attend = AttentionInterface()[ATTENTION]
    with torch.no_grad():
        before = model(IDS).logits
    with attached(model) as handle, outside(handle, lambda heads, dim: Gate(heads, dim, rate=10.0)) as gates:
        further = torch.optim.SGD(gates, lr=1.0)
        for gate in gates:
            assert not gate.any()
        options = TrainingOptions(steps=2, learning_rate=0.1)
        record = train(handle, tiny.tokenizer(), tokenize(tiny.tokenizer(), PAIRS), options=options, packed=packed)
        assert all(gate.grad is not None and gate.grad.any() for gate in gates)
        further.step()
        with torch.no_grad():
            assert not torch.equal(model(IDS).logits, before)
        assert record.steps_done == 2
    assert AttentionInterface()[ATTENTION] is attend
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)


def test_keys_have_a_learning_rate_of_their_own():
    model = tiny.model()
    with attached(model) as handle:
        before = handle.bake()
        with torch.no_grad():
            logits = model(IDS).logits
        with scaled_rates(handle, key=0.25) as further, torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, logits)
        assert further == []
        assert handle.num_trainable == sum(x.numel() for pair in before for x in pair)
        options = TrainingOptions(steps=1, learning_rate=0.01, batch_size=4)
        train(handle, tiny.tokenizer(), tokenize(tiny.tokenizer(), PAIRS), options=options)
        for (key, value), (old_key, old_value) in zip(handle.bake(), before, strict=True):
            torch.testing.assert_close((key - old_key).abs().max(), torch.tensor(0.0025), atol=1e-4, rtol=0)
            torch.testing.assert_close((value - old_value).abs().max(), torch.tensor(0.01), atol=1e-4, rtol=0)
