"""The prefix: where it starts, what is trained, what stays frozen, what it gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prefixcore.nn import LayerShape, Prefix, PrefixTuningConfig, join_layers, split_layers
from prefixcore.nn.trained import trained_parameters

SHAPES = [LayerShape(2, 8, 8), LayerShape(1, 6, 4)]
P = 5
ALL = ["none", "mlp", "low_rank", "random_basis"]


def _initial():
    generator = torch.Generator().manual_seed(11)
    return [
        (
            torch.randn(s.num_kv_heads, P, s.key_dim, generator=generator),
            torch.randn(s.num_kv_heads, P, s.value_dim, generator=generator),
        )
        for s in SHAPES
    ]


def _config(name, **options):
    return PrefixTuningConfig(P, **{"reparameterization": name, "rank": 2, "num_basis": 12, "seed": 0, **options})


def _same(one, other):
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize("name", ALL)
def test_begins_exactly_at_the_start_and_moves_with_a_step(name, frozen):
    initial = _initial()
    prefix = Prefix(SHAPES, _config(name, num_frozen_tokens=frozen), initial)
    assert _same(prefix(), initial)
    assert all(t.is_contiguous() and t.dtype == torch.float32 for pair in prefix() for t in pair)
    optimizer = torch.optim.SGD(prefix.parameters(), lr=0.01)
    target = [(torch.zeros_like(k), torch.zeros_like(v)) for k, v in initial]
    before = _distance(prefix(), target)
    before.backward()
    optimizer.step()
    assert _distance(prefix(), target) < before
    for (key, value), (k0, v0) in zip(prefix(), initial, strict=True):
        assert torch.equal(key[:, :frozen], k0[:, :frozen])
        assert torch.equal(value[:, :frozen], v0[:, :frozen])
        assert not torch.equal(key[:, frozen:], k0[:, frozen:])
        assert not torch.equal(value[:, frozen:], v0[:, frozen:])


def _distance(pairs, target):
    return (join_layers(pairs) - join_layers(target)).pow(2).sum()


def test_one_parameter_a_tensor_and_the_gradient_goes_there():
    prefix = Prefix(SHAPES, _config("none"), _initial())
    assert [name for name, _ in prefix.named_parameters()] == [
        "layers.0.key",
        "layers.0.value",
        "layers.1.key",
        "layers.1.value",
    ]
    assert not prefix.is_reparameterized
    key, _ = prefix()[1]
    (key * 3).sum().backward()
    assert torch.equal(prefix.layers[1].key.grad, torch.full((1, P, 6), 3.0))
    assert prefix.layers[0].key.grad is None


@pytest.mark.parametrize(("name", "count"), [("low_rank", 2 * (5 + 32) + 2 * (5 + 10)), ("random_basis", 12)])
def test_how_many_numbers_are_trained(name, count):
    prefix = Prefix(SHAPES, _config(name), _initial())
    assert prefix.is_reparameterized
    assert sum(p.numel() for p in prefix.parameters() if p.requires_grad) == count
    assert {n.partition(".")[0] for n, p in prefix.named_parameters() if not p.requires_grad} == {"initial"}


@pytest.mark.parametrize("frozen", [0, 2, P])
@pytest.mark.parametrize("init", ["random", "zero"])
@pytest.mark.parametrize("name", ALL)
def test_starts_that_need_no_model(name, init, frozen):
    if frozen == P and name != "none":
        with pytest.raises(ValueError, match="none would be left"):
            _config(name, init=init, num_frozen_tokens=frozen)
        return
    before = torch.get_rng_state()
    prefix = Prefix(SHAPES, _config(name, init=init, num_frozen_tokens=frozen))
    assert torch.equal(torch.get_rng_state(), before)
    assert _same(prefix(), Prefix(SHAPES, _config(name, init=init, num_frozen_tokens=frozen))())
    numbers = join_layers(prefix())
    assert numbers.shape == (P, 32 + 10)
    assert numbers.any() == (init == "random")
    assert not any(parameter.shape[0] == 0 for parameter in prefix.parameters())


def test_random_is_unit_normal():
    prefix = Prefix([LayerShape(4, 32, 32)] * 4, PrefixTuningConfig(32, init="random", seed=0))
    numbers = join_layers(prefix())
    assert numbers.mean().abs() < 0.02
    assert (numbers.std() - 1).abs() < 0.02


@pytest.mark.parametrize("name", ALL)
def test_bake_is_forward_in_memory_of_its_own(name):
    prefix = Prefix(SHAPES, _config(name, num_frozen_tokens=1), _initial())
    baked = prefix.bake()
    assert _same(baked, prefix())
    assert not any(t.requires_grad for pair in baked for t in pair)
    with torch.no_grad():
        for pair in baked:
            for tensor in pair:
                tensor.zero_()
    assert _same(prefix(), _initial())


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize("name", ALL)
def test_some_virtual_tokens_are_those_of_all(name, frozen):
    torch.manual_seed(0)
    prefix = Prefix(SHAPES, _config(name, num_frozen_tokens=frozen), _initial())
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter += torch.randn_like(parameter)
    for start, stop in ((0, 1), (0, 2), (1, 4), (3, 5), (0, P)):
        for some, whole in zip(prefix.bake_some(start, stop), prefix.bake(), strict=True):
            for got, all_of_them in zip(some, whole, strict=True):
                torch.testing.assert_close(got, all_of_them[:, start:stop], rtol=1e-5, atol=1e-5)


def test_the_start_is_not_shared_with_the_caller():
    initial = _initial()
    prefix = Prefix(SHAPES, _config("none"), initial)
    initial[0][0].zero_()
    assert _same(prefix(), _initial())


@pytest.mark.parametrize("name", ALL)
def test_what_is_fixed_never_gets_a_gradient_whoever_asks_for_one(name):
    prefix = Prefix(SHAPES, _config(name, num_frozen_tokens=2), _initial()).requires_grad_(True)
    _distance(prefix(), [(torch.randn_like(key), torch.randn_like(value)) for key, value in prefix()]).backward()
    trained = dict(trained_parameters(prefix))
    assert 0 < len(trained) < len(list(prefix.parameters()))
    assert {name for name, parameter in prefix.named_parameters() if parameter.grad is not None} == set(trained)


@pytest.mark.parametrize("name", ALL)
def test_state_dict_and_deepcopy_carry_everything(name):
    prefix = Prefix(SHAPES, _config(name, num_frozen_tokens=2), _initial())
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.add_(torch.randn_like(parameter))
    other = Prefix(SHAPES, _config(name, num_frozen_tokens=2), [(k * 2, v * 2) for k, v in _initial()])
    assert not _same(prefix(), other())
    other.load_state_dict(prefix.state_dict())
    assert _same(prefix(), other())
    assert _same(prefix(), copy.deepcopy(prefix)())


def test_config_is_settled():
    prefix = Prefix(SHAPES, PrefixTuningConfig(init_text="five tokens"), _initial())
    assert prefix.config.num_virtual_tokens == prefix.num_virtual_tokens == P
    tensors = PrefixTuningConfig(init=_initial())
    assert Prefix(SHAPES, tensors, tensors.init).config.init == "tensor"


@pytest.mark.parametrize(
    ("config", "initial", "message"),
    [
        (PrefixTuningConfig(P), None, "needs a model"),
        (PrefixTuningConfig(init_text="a"), None, "needs a model"),
        (PrefixTuningConfig(P + 1), "pairs", r"expected shape \[2, 6, 8\]"),
        (PrefixTuningConfig(init_text="a", num_frozen_tokens=P + 1), "pairs", "none would be left"),
        (PrefixTuningConfig(P, init="zero", reparameterization="low_rank", rank=50), None, "take rank <="),
        (PrefixTuningConfig(P, init="zero", reparameterization="random_basis", num_basis=999), None, "take fewer"),
    ],
)
def test_refused(config, initial, message):
    with pytest.raises(ValueError, match=message):
        Prefix(SHAPES, config, _initial() if initial else None)


def test_no_layers():
    with pytest.raises(ValueError, match="at least one layer"):
        Prefix([], PrefixTuningConfig(P, init="zero"))


@pytest.mark.parametrize("name", ALL)
def test_compiles_as_one_graph(name):
    prefix = Prefix(SHAPES, _config(name, num_frozen_tokens=1), _initial())
    compiled = torch.compile(prefix, fullgraph=True, backend="aot_eager")
    assert _same(compiled(), prefix())


@pytest.mark.parametrize("name", ["mlp", "random_basis"])
def test_layers_of_one_shape_are_laid_out_by_one_copy(name):
    """Not by two a layer; values and gradients are those of cutting the flat prefix up."""

    class Calls(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for layers in (2, 9):
        shapes = [LayerShape(2, 8, 8)] * layers
        # Random, without a start to add: an MLP alone; for a basis the start stays out of the count.
        prefix = Prefix(shapes, _config(name, init="random" if name == "mlp" else "zero"))
        with torch.no_grad():
            for _, parameter in trained_parameters(prefix):
                parameter.normal_()
        expected = split_layers(prefix.reparameterization(), shapes)
        assert _same(prefix(), expected)
        assert all(t.is_contiguous() for pair in prefix() for t in pair)
        target = [(torch.randn(2, P, 8), torch.randn(2, P, 8)) for _ in shapes]
        trained = [parameter for _, parameter in trained_parameters(prefix)]
        wanted = torch.autograd.grad(_distance(expected, target), trained)
        got = torch.autograd.grad(_distance(prefix(), target), trained)
        torch.testing.assert_close(got, wanted)
        prefix.initial = None
        with torch.no_grad(), Calls() as calls:
            prefix()
        counts.append(calls.count)
    assert counts[0] == counts[1]
