"""GPT2DoubleHeadsModel: choices are rows, and a place in the text is not one behind a soft prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2DoubleHeadsModel

import prefixcore

IDS = torch.randint(2, 97, (2, 3, 5), generator=torch.Generator().manual_seed(0))
PLACES = torch.tensor([[1, 2, 3], [4, 0, 2]])
SIZES: dict[str, Any] = {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
CONFIGS = [prefixcore.PrefixTuningConfig(3, seed=0), prefixcore.PromptTuningConfig(3, seed=0)]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return GPT2DoubleHeadsModel(GPT2Config(**SIZES)).eval()


@pytest.mark.parametrize("config", CONFIGS)
def test_choices_are_to_be_given_as_rows(model: Any, config: Any) -> None:
    bare = model(IDS, mc_token_ids=PLACES).logits
    with prefixcore.attach(model, config) as handle:
        with pytest.raises(NotImplementedError, match=r"choices \[2, 3, 5\].*input_ids.flatten"):
            model(IDS, mc_token_ids=PLACES)
        assert model(IDS.flatten(0, 1)).logits.shape == (6, 5, 97)
        with handle.disabled():
            assert torch.equal(model(IDS, mc_token_ids=PLACES).logits, bare)


def test_a_place_in_the_text_is_not_one_behind_a_soft_prompt(model: Any) -> None:
    rows, text = IDS.flatten(0, 1), torch.tensor([7, 8, 9])
    expected = model(torch.cat([text.expand(6, 3), rows], 1)).mc_logits
    start = model.transformer.wte.weight[text].detach().clone()
    with prefixcore.attach(model, prefixcore.PromptTuningConfig(3, init=start)):
        torch.testing.assert_close(model(rows).mc_logits, expected)
        with pytest.raises(NotImplementedError, match="mc_token_ids counts tokens"):
            model(rows, mc_token_ids=PLACES.flatten())


def test_it_is_one_behind_a_prefix(model: Any) -> None:
    rows = IDS.flatten(0, 1)
    with prefixcore.attach(model, CONFIGS[0]):
        last = model(rows).mc_logits
        assert torch.equal(model(rows, mc_token_ids=torch.full((6,), 4)).mc_logits, last)
