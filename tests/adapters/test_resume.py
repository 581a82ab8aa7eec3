"""Training that goes on from an adapter as if it had never stopped."""

from __future__ import annotations

import copy

import pytest
import torch

from prefixcore.adapters import Manifest, make_module, read_adapter, write_adapter
from prefixcore.nn import PrefixTuningConfig

from .models import CONFIGS, SHAPES, UNEVEN, flat, same, save
from .models import make_module as moved_module


def _train(module, optimizer, steps):
    """A loss with a gradient for every number, and not a quadratic one."""
    losses = []
    for _ in range(steps):
        loss = sum((tensor - 0.3).cos().sum() for tensor in flat(module()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("shapes", [SHAPES["llama"], UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("name", CONFIGS)
def test_goes_on_bit_for_bit(name, shapes, llama, tmp_path):
    module = save(tmp_path / "first", name, llama, shapes)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    _train(module, optimizer, 3)
    _save_again(tmp_path / "first", module)

    adapter = read_adapter(tmp_path / "first")
    again = make_module(adapter, trainable=True)
    assert (adapter.training_state is not None) == CONFIGS[name].is_reparameterized
    assert list(again.state_dict()) == list(module.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), module.state_dict().values(), strict=True)
    )
    assert [(n, p.requires_grad) for n, p in again.named_parameters()] == [
        (n, p.requires_grad) for n, p in module.named_parameters()
    ]
    assert again.config.to_dict() == module.config.to_dict()

    resumed = torch.optim.AdamW(again.parameters(), lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it would share the tensors
    assert _train(again, resumed, 4) == _train(module, optimizer, 4)
    assert same(again.bake(), module.bake())


def _save_again(folder, module):
    manifest = read_adapter(folder).manifest
    write_adapter(folder, module=module, config=module.config, manifest=manifest)


@pytest.mark.parametrize("name", CONFIGS)
def test_for_use_it_is_plain_and_frozen(name, llama, tmp_path):
    module = save(tmp_path, name, llama, SHAPES["llama"])
    adapter = read_adapter(tmp_path)
    plain = make_module(adapter)
    assert not plain.is_reparameterized
    assert not plain.config.is_reparameterized
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    assert same(plain(), module.bake())
    assert same(adapter.tensors, module.bake())


def test_the_training_state_is_there_only_if_it_says_more(llama, tmp_path):
    for name, config in CONFIGS.items():
        save(tmp_path / name, name, llama, SHAPES["llama"])
        assert (tmp_path / name / "training_state.safetensors").exists() == config.is_reparameterized


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_in_use_can_be_saved_again(name, llama, tmp_path):
    save(tmp_path / "one", name, llama, SHAPES["llama"])
    adapter = read_adapter(tmp_path / "one")
    plain = make_module(adapter)
    manifest = Manifest.create(llama, plain.config, adapter.layer_shapes or None)
    write_adapter(tmp_path / "two", module=plain, config=plain.config, manifest=manifest)
    again = read_adapter(tmp_path / "two")
    assert same(again.tensors, adapter.tensors)
    assert again.config.to_dict() == plain.config.to_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_module_cast_along_with_its_model_can_be_saved(name, dtype, llama, tmp_path):
    """What is baked is what the file's numbers make in fp32, so that training can go on from them."""
    config = CONFIGS[name]
    shapes = SHAPES["llama"] if isinstance(config, PrefixTuningConfig) else None
    module = moved_module(config, shapes or []).to(dtype)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    write_adapter(tmp_path / "a", module=module, config=config, manifest=Manifest.create(llama, config, shapes))
    adapter = read_adapter(tmp_path / "a")
    assert same(make_module(adapter, trainable=True).bake(), adapter.tensors)
    assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
