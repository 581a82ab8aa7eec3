"""The soft prompt: where it starts, what is trained, what it gives."""

from __future__ import annotations

import pytest
import torch

from prefixcore.nn import PromptTuningConfig, PTuningConfig, SoftPrompt

P, HIDDEN = 6, 16
CONFIGS = {
    "none": PromptTuningConfig(P, seed=0),
    "low_rank": PromptTuningConfig(P, reparameterization="low_rank", rank=2, seed=0),
    "random_basis": PromptTuningConfig(P, reparameterization="random_basis", num_basis=10, seed=0),
    "MLP": PTuningConfig(P, seed=0),
    "LSTM": PTuningConfig(P, encoder_reparameterization_type="LSTM", seed=0),
}


def _initial():
    return torch.randn(P, HIDDEN, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_begins_exactly_at_the_start_and_moves_with_a_step(config):
    prompt = SoftPrompt(HIDDEN, config, _initial())
    assert torch.equal(prompt(), _initial())
    before = prompt().pow(2).sum()
    before.backward()
    torch.optim.SGD(prompt.parameters(), lr=0.01).step()
    assert prompt().pow(2).sum() < before


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_state_dict_carries_everything(config):
    prompt = SoftPrompt(HIDDEN, config, _initial())
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.add_(torch.randn_like(parameter))
    other = SoftPrompt(HIDDEN, config, _initial() * 2)
    other.load_state_dict(prompt.state_dict())
    assert torch.equal(prompt(), other())
    baked = prompt.bake()
    assert torch.equal(baked, prompt())
    assert not baked.requires_grad
    baked.zero_()
    assert torch.equal(prompt(), other())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_some_virtual_tokens_are_those_of_all(config):
    prompt = SoftPrompt(HIDDEN, config, _initial())
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.add_(torch.randn_like(parameter))
    for start, stop in ((0, 1), (1, 4), (5, P), (0, P)):
        torch.testing.assert_close(prompt.bake_some(start, stop), prompt.bake()[start:stop], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["random", "zero"])
@pytest.mark.parametrize("name", CONFIGS)
def test_starts_that_need_no_model(name, init):
    values = {**CONFIGS[name].to_dict(), "init": init}
    prompt = SoftPrompt(HIDDEN, type(CONFIGS[name])(**values))
    assert prompt().shape == (P, HIDDEN)
    assert prompt().any() == (init == "random")
    assert torch.equal(prompt(), SoftPrompt(HIDDEN, type(CONFIGS[name])(**values))())


def test_is_one_parameter_unless_reparameterised():
    prompt = SoftPrompt(HIDDEN, CONFIGS["none"], _initial())
    assert [name for name, _ in prompt.named_parameters()] == ["embedding"]
    assert prompt() is prompt.embedding
    assert not prompt.is_reparameterized
    assert SoftPrompt(HIDDEN, CONFIGS["MLP"], _initial()).is_reparameterized
    basis = SoftPrompt(HIDDEN, CONFIGS["random_basis"], _initial())
    assert sum(p.numel() for p in basis.parameters() if p.requires_grad) == 10


def test_length_may_come_from_the_start():
    prompt = SoftPrompt(HIDDEN, PromptTuningConfig(init_text="six words"), _initial())
    assert prompt.config.num_virtual_tokens == prompt.num_virtual_tokens == P


@pytest.mark.parametrize(
    ("config", "initial", "message"),
    [
        (PromptTuningConfig(P), None, "needs the model's embeddings"),
        (PTuningConfig(P), None, "needs the model's embeddings"),
        (PromptTuningConfig(P + 1), _initial(), r"expected shape \[7, 16\]"),
        (PromptTuningConfig(P), _initial()[:, :8], r"expected shape \[6, 16\], got \[6, 8\]"),
        (PromptTuningConfig(P), _initial().long(), "floating-point"),
        (PromptTuningConfig(P), _initial() / 0, "NaN or infinite"),
    ],
)
def test_refused(config, initial, message):
    with pytest.raises(ValueError, match=message):
        SoftPrompt(HIDDEN, config, initial)
