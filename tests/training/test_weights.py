"""The digest notices every change of a base weight, and no virtual token."""

from __future__ import annotations

import torch
from torch import nn

from prefixcore.training import base_parameters, weights_digest
from tests import tiny


def test_the_digest_follows_the_bytes():
    model = tiny.model()
    digest = weights_digest(model)
    assert digest == weights_digest(tiny.model())
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[3, 4] += 1e-6
    assert weights_digest(model) != digest


def test_dtype_and_shape_count():
    one = nn.ParameterDict({"w": nn.Parameter(torch.zeros(4, 2))})
    other = nn.ParameterDict({"w": nn.Parameter(torch.zeros(2, 4))})
    half = nn.ParameterDict({"w": nn.Parameter(torch.zeros(8, 2, dtype=torch.bfloat16))})
    assert len({weights_digest(module) for module in (one, other, half)}) == 3


def test_virtual_tokens_are_left_out():
    model = tiny.model()
    digest = weights_digest(model)
    names = [name for name, _ in base_parameters(model)]
    model.add_module("prefixcore", nn.Linear(3, 3))
    assert weights_digest(model) == digest
    assert [name for name, _ in base_parameters(model)] == names
