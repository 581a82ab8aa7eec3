"""Linear layers whose quantised weights take another form in a forward.

bitsandbytes' of 4 bits lose their backward on a CPU at the first forward in evaluation mode. Beside bitsandbytes
itself, where it is installed and the CPU has bfloat16 products, a stand-in does the same. Those of compressed-tensors
are unpacked at the model's first forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prefixcore
from prefixcore.adapters import compare_fingerprints, fingerprint
from prefixcore.hf.model.four_bits import SWITCH

from .models import close, make, tokens

IDS = tokens(2, 7)
CONFIGS = {
    "prefix": prefixcore.PrefixTuningConfig(num_virtual_tokens=4, seed=0),
    "prompt": prefixcore.PromptTuningConfig(num_virtual_tokens=4, seed=0),
}
SIZES = {"hidden_size": 64, "intermediate_size": 64}  # bitsandbytes packs blocks of 32 rows and 64 columns


class StandIn(nn.Linear):
    """A layer that turns its rows around at the first forward in evaluation mode, and has no backward from then on."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight: Any = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.weight.quant_state = SimpleNamespace(shape=linear.weight.shape, nested=True, packing_format_for_cpu=False)
        self.support_avx512bf16_for_cpu = 1

    def forward(self, input: Tensor) -> Tensor:
        state = self.weight.quant_state
        may_pack = self.support_avx512bf16_for_cpu and not self.training and not input.requires_grad
        if may_pack and not state.packing_format_for_cpu:
            self.weight.data, state.packing_format_for_cpu = self.weight.data.flip(0), True
        if state.packing_format_for_cpu:
            return nn.functional.linear(input.detach(), self.weight.flip(0))
        return nn.functional.linear(input, self.weight)


def unpack(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
    state.packing_format_for_cpu = False
    return packed.flip(0), state


def with_bitsandbytes(linear: nn.Linear) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if not bitsandbytes.functional.has_avx512bf16():
        pytest.skip("this CPU has no bfloat16 products")
    made = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    made.weight = bitsandbytes.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4", module=made)
    return made.to("cpu")


@pytest.fixture(params=["stand-in", "bitsandbytes"])
def quantized(request: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Makes a model of such layers, in evaluation mode."""
    if request.param == "stand-in":
        module: Any = ModuleType("bitsandbytes")
        module.functional = SimpleNamespace(
            _convert_weight_packed_for_cpu_inverse=unpack, dequantize_4bit=lambda packed, state: packed
        )
        monkeypatch.setitem(sys.modules, "bitsandbytes", module)

    def made() -> Any:
        model = make("llama", **SIZES)
        for layer in model.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name, linear in list(block.named_children()):
                    if isinstance(linear, nn.Linear):
                        change = StandIn if request.param == "stand-in" else with_bitsandbytes
                        setattr(block, name, change(linear))
        return model.eval()

    return made


def states(model: Any) -> list[bool]:
    """Of each layer whether it has been laid out anew."""
    layers = [module for module in model.modules() if hasattr(module, SWITCH)]
    assert len(layers) == 14
    return [bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False)) for layer in layers]


def gradients(model: Any, handle: Any) -> list[Tensor]:
    for parameter in handle.parameters():
        parameter.grad = None
    model(IDS, labels=IDS).loss.backward()
    return [parameter.grad.clone() for parameter in handle.parameters()]


def expected_gradients(model: Any, config: Any) -> list[Tensor]:
    """Those of the same model whose weights are plain numbers."""
    from prefixcore.adapters.weights import Weight, _dequantized

    plain = make("llama", **SIZES)
    for name, module in model.named_modules():
        if hasattr(module, SWITCH):
            weight = Weight(name, module.weight, module, "weight")
            plain.get_submodule(name).weight.data = _dequantized(module.weight.detach(), weight)[1].reshape(
                module.out_features, module.in_features
            )
    return gradients(plain, prefixcore.attach(plain, config))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("before", ["nothing", "generate"])
def test_gradients_pass(config: Any, before: str, quantized: Callable[[], Any]) -> None:
    """Also after the model has answered, before it was attached or meanwhile."""
    model = quantized()
    expected = expected_gradients(model, config)
    if before == "generate":
        model.generate(IDS, max_new_tokens=2)
        assert all(states(model))
    handle = prefixcore.attach(model, config)
    for _ in range(2):
        for got, wanted in zip(gradients(model, handle), expected, strict=True):
            assert (got - wanted).norm() < 0.1 * wanted.norm()  # their scales were rounded to 16 bits
        model.generate(IDS, max_new_tokens=2)
        assert not any(states(model))
    handle.detach()
    model(IDS)
    model.generate(IDS, max_new_tokens=2)
    assert all(states(model))


def test_what_is_not_trained_keeps_the_quick_kernel(quantized: Callable[[], Any], tmp_path: Path) -> None:
    with prefixcore.attach(quantized(), CONFIGS["prefix"]) as handle:
        handle.save(tmp_path / "adapter")
    model = quantized()
    prefixcore.load(model, tmp_path / "adapter")
    assert not any(states(model)), "looking at a model changes nothing"
    model.generate(IDS, max_new_tokens=2)
    assert all(states(model))


@pytest.mark.parametrize("which", ["the adapter's", "this"])
def test_a_model_is_known_in_either_form(which: str, quantized: Callable[[], Any]) -> None:
    fresh, packed = quantized(), quantized()
    packed.generate(IDS, max_new_tokens=2)
    assert all(states(packed))
    assert not any(states(fresh))
    pair = (fingerprint(packed), fingerprint(fresh))
    compare_fingerprints(*(pair if which == "this" else reversed(pair)))


class Unpacked(nn.Linear):
    """A layer of int8 numbers and scales, until `unpack` makes plain ones of them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        weight = linear.weight.detach()
        del self.weight
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        self.weight_packed = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.status = "packed"

    def unpack(self) -> None:
        self.weight = nn.Parameter(self.weight_packed * self.weight_scale, requires_grad=False)
        del self.weight_packed
        self.status = "unpacked"

    def forward(self, input: Tensor) -> Tensor:
        if self.status == "packed":
            raise AssertionError("the model was not unpacked")
        return super().forward(input)


def unpacked_at_first_forward() -> Any:
    model = make("llama", **SIZES)
    for layer in model.model.layers:
        layer.mlp.up_proj = Unpacked(layer.mlp.up_proj)

    def unpack_all(model: nn.Module, args: Any) -> None:
        for layer in (module for module in model.modules() if isinstance(module, Unpacked)):
            layer.unpack()
        hook.remove()

    hook = model.register_forward_pre_hook(unpack_all)
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_model_that_is_unpacked_at_its_first_forward(config: Any, tmp_path: Path) -> None:
    """Attaching runs it, and the adapter is known to be its own before and after."""
    model = unpacked_at_first_forward()
    handle = prefixcore.attach(model, config)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad.any() for parameter in handle.parameters())
    handle.save(tmp_path / "adapter")
    expected = model.eval()(IDS).logits
    fresh = unpacked_at_first_forward()
    prefixcore.load(fresh, tmp_path / "adapter")
    close(fresh(IDS).logits, expected)
