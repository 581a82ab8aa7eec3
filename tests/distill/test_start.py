"""Which of the text's tokens the prefix starts from, and where their keys stand."""

from __future__ import annotations

import pytest
import torch

from prefixcore.distill import Prompt
from prefixcore.distill.front import Front
from prefixcore.distill.start import attention_on, heaviest, moved, spread, starting_values
from prefixcore.distill.targets import Target
from prefixcore.distill.writing import Asked
from prefixcore.hf.baking.bake_prefix import ids_to_prefix

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


def test_where_a_part_of_each_key_turns_the_first_tokens_are_taken():
    from transformers import StableLmConfig, StableLmForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    partial = StableLmForCausalLM(StableLmConfig(vocab_size=98, num_key_value_heads=1, **sizes)).eval()
    front = Front.of(partial, IDS)
    start = starting_values(partial, front, 3, "match", [target([30, 31])], front.pairs)
    assert (start.places, start.kind) == ([0, 1, 2], "first")
