"""Which of the text's tokens the prefix starts from, and where their keys stand."""

from __future__ import annotations

import pytest
import torch
import transformers

import prefixcore
from prefixcore.distill import Prompt
from prefixcore.distill import start as starts
from prefixcore.distill.front import Front
from prefixcore.distill.start import attention_on, heaviest, moved, spread, starting_values
from prefixcore.distill.targets import Target
from prefixcore.distill.writing import Asked
from prefixcore.hf.baking.bake_prefix import ids_to_prefix
from prefixcore.hf.positions.rotary import turn

IDS = [5, 6, 7, 8, 9, 10, 11, 12]


def target(ids):
    return Target(Asked(Prompt("x"), ids, ids), [20, 21], torch.zeros(2, 1), torch.zeros(2, 1))


def test_places():
    assert spread(9, 3) == [0, 4, 8]
    assert spread(9, 1) == [0]
    assert heaviest(torch.tensor([0.0, 1.0, 5.0, 2.0, 4.0]), 3) == [0, 2, 4]


def test_keys_are_moved_to_where_the_token_would_be_computed(model):
    """In the first layer a key follows from a token and its position alone."""
    places = [0, 3, 5]
    (key, value), *_ = moved(model, ids_to_prefix(model, IDS), places)
    (expected_key, expected_value), *_ = ids_to_prefix(model, [IDS[place] for place in places])
    torch.testing.assert_close(key, expected_key, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(value, expected_value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["first", "spread", "mass"])
def test_values_are_those_of_the_text(model, kind):
    front = Front.of(model, IDS)
    start, places, used, why = starting_values(model, front, 3, kind, [target([30, 31])], front.pairs)
    assert (used, why) == (kind, "")
    assert places[0] == 0
    assert len(places) == 3
    for (_, value), (_, own) in zip(start, front.pairs, strict=True):
        assert torch.equal(value, own[:, places])
    if kind == "first":
        assert all(torch.equal(key, own[:, :3]) for (key, _), (own, _) in zip(start, front.pairs, strict=True))


def test_attention_on_the_text_is_a_share_of_all(model):
    front = Front.of(model, IDS)
    mass = attention_on(model, front, [target([30, 31])])
    assert mass.shape == (8,)
    assert (mass > 0).all()
    assert mass.sum() < 2 * 4  # two layers, four tokens that read


@pytest.mark.parametrize("kind", ["match", "mass", "spread"])
def test_where_keys_cannot_be_moved_the_first_tokens_are_taken(kind):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=98, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
    front = Front.of(learned, IDS)
    start = starting_values(learned, front, 3, kind, [], front.pairs)
    assert (start.places, start.kind) == ([0, 1, 2], "first")
    assert "learned positions" in start.why
    assert torch.equal(start.values[0][0], front.pairs[0][0][:, :3])


SIZES = {"vocab_size": 98, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
WINDOW = {"sliding_window": 64, "max_position_embeddings": 64, "head_dim": 16, "layer_types": [
    "sliding_attention", "full_attention"]}  # fmt: skip
FAMILIES = {
    "Phi": {**HEADS, "partial_rotary_factor": 0.5},
    "Glm": {**HEADS, "head_dim": 16, "partial_rotary_factor": 0.5, "pad_token_id": 0},
    "StableLm": HEADS,
    "Gemma3": {**HEADS, **WINDOW},
    "Qwen3Moe": {**HEADS, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
"""Of which a part turns, in halves or in pairs; each kind of layer by its table; with experts."""


def of(family):
    """A tiny model."""
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config"))
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config(**SIZES, **FAMILIES[family])).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_whose_keys_turn_in_its_own_way_starts_as_it_was_asked_to(family, monkeypatch):
    """In the first layer a key follows from a token and its position alone."""
    model = of(family)
    front = Front.of(model, IDS)
    spread_out = starting_values(model, front, 3, "spread", [], front.pairs)
    assert (spread_out.places, spread_out.why) == ([0, 4, 7], "")
    expected, _ = ids_to_prefix(model, [IDS[place] for place in spread_out.places])[0]
    torch.testing.assert_close(spread_out.values[0][0], expected, atol=1e-4, rtol=1e-4)
    # What is fitted stands where the last tokens of the text stood, and is moved to the first places.
    monkeypatch.setattr(starts, "fitted", lambda reads, key, value, count: (key[:, -count:], value[:, -count:]))
    start = starting_values(model, front, 3, "match", [target([30, 31])], front.pairs)
    assert (start.kind, start.why) == ("match", "")
    expected, _ = ids_to_prefix(model, IDS[-3:])[0]
    torch.testing.assert_close(start.values[0][0], expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(value, own[:, -3:]) for (_, value), (_, own) in zip(start.values, front.pairs, strict=True))


def test_what_is_fitted_is_nearer_to_the_text_for_being_turned():
    """A part of each key turns, in pairs."""
    model = of("Glm")
    front = Front.of(model, IDS)
    targets = [target(ids) for ids in ([30, 31, 32], [40, 41], [50, 51, 52, 53])]
    start = starting_values(model, front, 3, "match", targets, front.pairs)
    assert (start.kind, start.why) == ("match", "")
    divergence = []
    expected = [logits(model, front.pairs, each) for each in targets]
    for pairs in (start.values, turn(model, start.values, len(IDS) - 3)):
        found = [logits(model, pairs, each) for each in targets]
        each = [(a.exp() * (a - b)).sum(-1).mean() for a, b in zip(expected, found, strict=True)]
        divergence.append(float(torch.stack(each).mean()))
    assert divergence[0] < 0.8 * divergence[1]


def logits(model, pairs, each):
    """What the model says of a prompt and its answer behind keys and values."""
    with prefixcore.attach(model, prefixcore.PrefixTuningConfig(init=pairs)), torch.no_grad():
        return model(torch.tensor([each.asked.behind + each.answer])).logits.log_softmax(-1)
