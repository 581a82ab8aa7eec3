"""What is trained in place of virtual tokens: PEFT's parametrisations, low rank, and the random basis."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PrefixEncoder, PromptEncoder, PromptEncoderConfig
from peft import PrefixTuningConfig as PeftPrefixConfig

from prefixcore.nn import LayerShape, Prefix, PrefixTuningConfig, PTuningConfig, SoftPrompt, join_layers
from prefixcore.nn.reparameterization import LowRank, RandomBasis, hadamard

SHAPES = [LayerShape(2, 8, 8)] * 3
P = 5


def _peft_prefix(**options):
    return PrefixEncoder(
        PeftPrefixConfig(num_virtual_tokens=P, token_dim=16, num_layers=3, num_attention_heads=2, **options)
    )


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("projection", [False, True])
def test_prefix_is_pefts_from_the_same_seed(projection, zero):
    torch.manual_seed(7)
    peft = _peft_prefix(prefix_projection=projection, encoder_hidden_size=12, init_weights="zero" if zero else None)
    torch.manual_seed(7)
    config = PrefixTuningConfig(
        P, init="zero" if zero else "random", prefix_projection=projection, encoder_hidden_size=12
    )
    ours = Prefix(SHAPES, config)
    expected = peft(torch.arange(P))
    assert torch.equal(join_layers(ours()), expected)
    if not zero:
        assert expected.std() > 0.05
    if projection:
        assert ours.reparameterization.state_dict().keys() == peft.state_dict().keys()
        weights = torch.randn(P, 96)
        (join_layers(ours()) * weights).sum().backward()
        (peft(torch.arange(P)) * weights).sum().backward()
        theirs = dict(peft.named_parameters())
        for name, parameter in ours.reparameterization.named_parameters():
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("kind", "layers"), [("MLP", 2), ("LSTM", 1), ("LSTM", 2)])
def test_p_tuning_encoder_is_pefts_from_the_same_seed(kind, layers):
    torch.manual_seed(3)
    peft = PromptEncoder(
        PromptEncoderConfig(
            num_virtual_tokens=P,
            token_dim=16,
            num_transformer_submodules=1,
            encoder_reparameterization_type=kind,
            encoder_hidden_size=12,
            encoder_num_layers=layers,
        )
    )
    torch.manual_seed(3)
    config = PTuningConfig(
        P,
        init="random",
        encoder_reparameterization_type=kind,
        encoder_hidden_size=12,
        encoder_num_layers=layers,
    )
    ours = SoftPrompt(16, config)
    assert ours.reparameterization.state_dict().keys() == peft.state_dict().keys()
    assert torch.equal(ours(), peft(torch.arange(P)))
    weights = torch.randn(P, 16)
    (ours() * weights).sum().backward()
    (peft(torch.arange(P)) * weights).sum().backward()
    theirs = dict(peft.named_parameters())
    for name, parameter in ours.reparameterization.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-6, atol=1e-7)


def test_lstm_dropout_acts_in_training_only_and_never_in_bake():
    config = PTuningConfig(P, init="random", encoder_reparameterization_type="LSTM", encoder_dropout=0.5, seed=0)
    prompt = SoftPrompt(16, config)
    prompt.train()
    assert not torch.equal(prompt(), prompt())
    baked = prompt.bake()
    assert torch.equal(baked, prompt.bake())
    assert prompt.training
    prompt.eval()
    assert torch.equal(prompt(), baked)


def test_one_lstm_layer_with_dropout_does_not_warn():
    config = PTuningConfig(
        P,
        init="random",
        encoder_reparameterization_type="LSTM",
        encoder_num_layers=1,
        encoder_dropout=0.5,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SoftPrompt(16, config)


@pytest.mark.parametrize("name", ["mlp", "low_rank", "random_basis"])
def test_every_parameter_gets_an_exact_gradient(name):
    config = PrefixTuningConfig(
        4, init="random", reparameterization=name, rank=2, num_basis=11, encoder_hidden_size=3, seed=1
    )
    prefix = Prefix([LayerShape(1, 4, 3), LayerShape(2, 2, 2)], config).double()
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    parameters = [parameter for parameter in prefix.parameters() if parameter.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: join_layers(prefix()), parameters)
    loss = join_layers(prefix()).pow(2).sum()
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, parameters))


def test_low_rank_has_the_rank_it_says():
    module = LowRank(12, [20, 30], rank=3)
    assert not module().any()
    with torch.no_grad():
        for right in module.right:
            right.normal_()
    for block in module().split([20, 30], dim=1):
        assert torch.linalg.matrix_rank(block) == 3
    assert sum(p.numel() for p in module.parameters()) == 3 * (12 + 20) + 3 * (12 + 30)


def test_low_rank_refuses_to_train_more_than_the_prefix_has():
    LowRank(4, [48], rank=3)
    with pytest.raises(ValueError, match="take rank <= 3"):
        LowRank(4, [48], rank=4)
    with pytest.raises(ValueError, match="another reparameterization"):
        LowRank(1, [48], rank=1)


@pytest.mark.parametrize("size", [1, 2, 8, 32])
def test_hadamard_is_the_matrix(size):
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    x = torch.randn(3, size)
    torch.testing.assert_close(hadamard(x), x @ matrix)


def _basis(module: RandomBasis) -> torch.Tensor:
    """The basis as a matrix, one column a coefficient."""
    columns = []
    for unit in torch.eye(module.num_basis):
        with torch.no_grad():
            module.coefficients.copy_(unit)
            columns.append(module().flatten())
    return torch.stack(columns, dim=1)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), width=st.integers(1, 40), data=st.data())
def test_random_basis_is_dense_linear_and_of_unit_step(rows, width, data):
    num_basis = data.draw(st.integers(1, rows * width))
    module = RandomBasis(rows, width, num_basis, seed=data.draw(st.integers(0, 2**63 - 1)))
    basis = _basis(module)
    torch.testing.assert_close(basis.abs(), torch.full_like(basis, 1 / math.sqrt(num_basis)))
    z = torch.randn(num_basis)
    with torch.no_grad():
        module.coefficients.copy_(z)
    torch.testing.assert_close(module().flatten(), basis @ z, rtol=1e-4, atol=1e-5)


def test_random_basis_vectors_are_orthogonal():
    basis = _basis(RandomBasis(8, 64, num_basis=24, seed=0))  # 512 numbers: 16 whole blocks of 32
    torch.testing.assert_close(basis.T @ basis, torch.eye(24) * 512 / 24, rtol=1e-5, atol=1e-4)


def test_random_basis_depends_on_the_seed_alone():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        one = _basis(RandomBasis(3, 16, 10, seed=4))
        torch.manual_seed(2)
        assert torch.equal(one, _basis(RandomBasis(3, 16, 10, seed=4)))
    assert not torch.equal(one, _basis(RandomBasis(3, 16, 10, seed=5)))
    # These signs are what adapters on disk were trained with: they may never change.
    assert RandomBasis(1, 8, 8, seed=0).sign.tolist() == [[1, -1, -1, 1, -1, -1, 1, 1]]
    assert RandomBasis(1, 8, 8, seed=0).flip.tolist() == [[-1, 1, -1, 1, 1, 1, 1, -1]]


def test_random_basis_stores_its_coefficients_alone_and_is_small():
    module = RandomBasis(23, 11520, num_basis=1000, seed=0)  # SmolLM2-135M's prefix of 23 virtual tokens
    assert list(module.state_dict()) == ["coefficients"]
    held = sum(t.numel() * t.element_size() for t in [*module.buffers(), *module.parameters()])
    assert held < 3 * 23 * 11520
    with pytest.raises(ValueError, match="only 20 numbers"):
        RandomBasis(4, 5, num_basis=21, seed=0)


def test_autocast_does_not_reach_the_virtual_tokens():
    for name in ("mlp", "low_rank"):
        config = PrefixTuningConfig(4, init="random", reparameterization=name, rank=2, seed=0)
        prefix = Prefix(SHAPES, config)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = prefix()
        for (key, value), (k, v) in zip(inside, prefix(), strict=True):
            assert torch.equal(key, k)
            assert torch.equal(value, v)
    prompt = SoftPrompt(16, PTuningConfig(4, init="random", encoder_reparameterization_type="LSTM"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prompt(), prompt())
        assert prompt().dtype == torch.float32
