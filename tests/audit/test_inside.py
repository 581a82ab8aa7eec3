"""Attention on the virtual tokens, and what each does, against eager attention over a cache filled by hand."""

from __future__ import annotations

import copy

import pytest
import torch

import prefixcore
from prefixcore.adapters import read_adapter
from prefixcore.audit.attention_mass import attention_mass, virtual_weights
from prefixcore.audit.errors import NotMeasuredError
from prefixcore.audit.leave_one_out import leave_one_out
from prefixcore.audit.norms import norms_by_layer
from prefixcore.audit.running import FrozenRun
from prefixcore.audit.virtual import VirtualTokens, virtual_tokens
from prefixcore.hf.reaching import find_attention_layers
from tests.audit import eager
from tests.hf.models import FAMILIES, make, tokens, window_of


def test_a_run_is_what_the_attached_model_computes(model, adapter, virtual):
    ids, mask = tokens(3, 8) % 90, torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:] = mask[2, 2:] = 0
    found = FrozenRun(model)(ids, mask, virtual)
    with prefixcore.load(model, adapter):
        expected = model(input_ids=ids, attention_mask=mask).logits
    seen = mask.bool()
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-4, atol=1e-4)
    assert (expected[seen] - model(ids, mask).logits[seen]).abs().max() > 0.1


def test_attention_is_that_of_eager_weights(model, virtual, probes, quiet):
    found = attention_mass(FrozenRun(model), probes, virtual, quiet)
    layers, heads, count = 2, 4, virtual.count
    by_head, by_token, first, read = (
        torch.zeros(layers, heads),
        torch.zeros(layers, count),
        torch.zeros(layers, heads),
        0,
    )
    for text in probes.ids:
        ids = [*text.prompt_ids, *text.completion_ids]
        _, weights = eager.run(model, ids, virtual, range(count))
        for layer, each in enumerate(weights):  # [H, T, P + T]
            by_head[layer] += each[..., :count].sum((1, 2))
            by_token[layer] += each[..., :count].sum(1).mean(0)
            first[layer] += each[:, len(text.prompt_ids) - 1, :count].sum(1)
        read += len(ids)
    torch.testing.assert_close(found.by_head.float(), by_head / read, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.by_token.float(), by_token / read, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.first_answer.float(), first / len(probes), rtol=1e-4, atol=1e-5)
    assert found.by_head.std() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_attention_in_every_family(family, kind):
    """Softcap, sinks, scales, grouped heads, and a sliding window that hides a part of a soft prompt."""
    window = window_of(family, 6) if kind == "prompt" else {}
    tiny, count, ids = make(family, **window), 4, tokens(1, 9)
    torch.manual_seed(3)
    if kind == "prefix":
        shapes = [call.shape for call in find_attention_layers(tiny)[0]]
        pairs = {i: (torch.randn(s.num_kv_heads, count, s.key_dim), torch.randn(s.num_kv_heads, count, s.value_dim))
                 for i, s in enumerate(shapes)}  # fmt: skip
        virtual = VirtualTokens(count, tuple(range(count)), pairs)
    else:
        virtual = VirtualTokens(count, tuple(range(count)), {}, torch.randn(count, 32))
    found = []
    in_text = 0 if kind == "prefix" else count
    logits = FrozenRun(tiny)(ids, None, virtual, watch=lambda call: found.append(virtual_weights(call, in_text)[0]))
    expected, weights = eager.run(tiny, ids[0].tolist(), virtual, range(count))
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(found, weights, strict=True):
        torch.testing.assert_close(ours, theirs[..., :count], rtol=1e-4, atol=1e-5)
    if window:
        assert min(float(each.min()) for each in found) == 0  # hidden by the window


def test_each_virtual_token_left_out(model, virtual, probes, quiet):
    found = leave_one_out(FrozenRun(model), probes, virtual, 97, quiet)
    everything = list(range(virtual.count))
    whole = torch.cat([eager.loss(model, text, virtual, everything) for text in probes.ids])
    assert found["loss"] == pytest.approx(float(whole.mean()), rel=1e-4)
    for entry in found["removed"]:
        kept = [i for i in everything if i != entry["token"]]
        parts = [eager.loss(model, text, virtual, kept) for text in probes.ids]
        change = float((torch.cat(parts) - whole).mean())
        assert entry["change"] == pytest.approx(change, abs=1e-4)
        lengths = [len(text.completion_ids) for text in probes.ids]
        worse = sum(bool(a.mean() > b.mean()) for a, b in zip(parts, whole.split(lengths), strict=True))
        assert entry["probes_worse"] == pytest.approx(worse / len(parts))
    changes = [entry["change"] for entry in found["removed"]]
    assert max(changes) - min(changes) > 0.05
    assert found["largest_change"] == max(changes)
    assert changes[found["most_needed"]] == max(changes)


def test_the_only_virtual_token_left_out_is_the_bare_model_further_on(model, probes, quiet):
    pairs = {layer: (torch.randn(2, 1, 16), torch.randn(2, 1, 16)) for layer in range(2)}
    virtual = VirtualTokens(1, (0,), pairs)
    found = leave_one_out(FrozenRun(model), probes, virtual, 97, quiet)
    bare = torch.cat([eager.loss(model, text, VirtualTokens(1, (), pairs), []) for text in probes.ids])
    assert found["removed"][0]["loss"] == pytest.approx(float(bare.mean()), rel=1e-4)


def test_norms_are_those_of_the_tensors(model, prefix, probes, quiet):
    from prefixcore.adapters import read_adapter
    from prefixcore.audit.virtual import virtual_tokens

    virtual = virtual_tokens(read_adapter(prefix))
    found = norms_by_layer(FrozenRun(model), probes, virtual, quiet)
    key, value = virtual.pairs[1]
    assert found["key"][1]["virtual"]["greatest"] == pytest.approx(
        float(key.transpose(0, 1).flatten(1).norm(dim=1).max())
    )
    values = []
    for text in probes.ids:
        with torch.no_grad():
            hidden = copy.deepcopy(model).model(
                torch.tensor([[*text.prompt_ids, *text.completion_ids]]), output_hidden_states=True
            )
            layer = model.model.layers[1]
            values.append(layer.self_attn.v_proj(layer.input_layernorm(hidden.hidden_states[1][0])).norm(dim=1))
    assert found["value"][1]["text"]["greatest"] == pytest.approx(float(torch.cat(values).max()), rel=1e-3)


def test_a_model_without_positions_is_named():
    class NoPositions(torch.nn.Module):
        def forward(self, input_ids):
            raise AssertionError("not called")

    with pytest.raises(NotMeasuredError, match="NoPositions takes no positions"):
        FrozenRun(NoPositions())(torch.zeros(1, 1, dtype=torch.long))


def test_the_model_is_as_it_was(model, virtual):
    from tests.hf.models import assert_same, state

    before = state(model)
    FrozenRun(model)(tokens(1, 4) % 90, virtual=virtual)
    assert_same(before, state(model))


def test_a_text_that_begins_at_position_0(model, tmp_path):
    """What is watched is what the attached model computes, where the prefix leaves the text in its place, too."""
    config = prefixcore.PrefixTuningConfig(num_virtual_tokens=5, init="random", seed=0, position_offset=False)
    ids = tokens(2, 8) % 90
    with prefixcore.attach(model, config) as handle:
        folder, expected = handle.save(tmp_path / "zero"), model(input_ids=ids).logits
    virtual = virtual_tokens(read_adapter(folder))
    torch.testing.assert_close(FrozenRun(model)(ids, None, virtual), expected, rtol=1e-4, atol=1e-4)
    assert virtual.without(2).text_position == virtual.text_position == 0
