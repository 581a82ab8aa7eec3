"""Derivatives and maps of `torch.func` over an attached model, through the reference of the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig

from .models import close, make, tokens

CONFIGS = {
    "prefix": PrefixTuningConfig(num_virtual_tokens=4, seed=0),
    "mlp": PrefixTuningConfig(num_virtual_tokens=4, reparameterization="mlp", seed=0),
    "prompt": PromptTuningConfig(num_virtual_tokens=4, seed=0),
}


def loss_of(config: Any) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """The loss of one text as a function of the virtual tokens, and their values."""
    model = make("llama", attn_implementation="eager")  # SDPA's kernels have no forward mode on a CPU
    prefixcore.attach(model, config)
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    virtual = {name: values for name, values in named.items() if name.startswith("prefixcore.")}

    def compute(virtual: dict[str, Tensor], ids: Tensor) -> Tensor:
        rows = {"input_ids": ids[None], "labels": ids[None], "use_cache": False}
        result: Tensor = functional_call(model, {**named, **virtual}, (), rows).loss
        return result

    return compute, virtual


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_forward_mode_is_the_gradient_times_the_direction(config: Any) -> None:
    """Not zero, as if the virtual tokens, of which none requires a gradient here, were frozen."""
    compute, virtual = loss_of(config)
    (ids,) = tokens(1, 7)
    generator = torch.Generator().manual_seed(3)
    direction = {name: torch.randn(values.shape, generator=generator) for name, values in virtual.items()}
    with prefixcore.use_backend("reference"):
        gradient = grad(compute)(virtual, ids)
        _, along = jvp(lambda virtual: compute(virtual, ids), (virtual,), (direction,))
    expected = torch.stack([(gradient[name] * direction[name]).sum() for name in virtual]).sum()
    assert expected.abs() > 1e-3
    torch.testing.assert_close(along, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_of_each_text(config: Any) -> None:
    compute, virtual = loss_of(config)
    ids = tokens(2, 7)
    with prefixcore.use_backend("reference"):
        together = vmap(grad(compute), in_dims=(None, 0))(virtual, ids)
        for row, text in enumerate(ids):
            for name, gradient in grad(compute)(virtual, text).items():
                close(together[name][row], gradient)


def test_ids_beyond_the_table_are_seen_under_vmap() -> None:
    compute, virtual = loss_of(CONFIGS["prompt"])
    ids = tokens(2, 7)
    ids[1, 3] = 97
    with prefixcore.use_backend("reference"), pytest.raises(IndexError, match=r"from 0 to 96, got \d+ to 97"):
        vmap(compute, in_dims=(None, 0))(virtual, ids)
