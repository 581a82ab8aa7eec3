"""`soft_embedding` by its default kernels, beside a copy of as many bytes and beside embedding + concatenate."""

from __future__ import annotations

import pytest
import torch

import prefixcore
from bench.gates import gate
from bench.scale import pick

from .conftest import Measure
from .device import DEVICE, HALF

SHAPES = pick(smoke=[(2, 24, 5, 97, 32)], quick=[(8, 2048, 64, 128256, 4096)],
              full=[(8, 2048, 64, 128256, 4096), (1, 512, 20, 128256, 2048), (32, 2048, 512, 32000, 4096)])  # fmt: skip


@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
@pytest.mark.parametrize(("B", "T", "P", "V", "E"), SHAPES)
def test_soft_embedding(measure: Measure, B: int, T: int, P: int, V: int, E: int, backward: bool) -> None:
    backend = prefixcore.which_backend("soft_embedding", DEVICE, HALF)
    assert backend.name != "reference", backend.why
    text = torch.randint(0, V, (B, T), device=DEVICE)
    ids = torch.cat([torch.arange(V, V + P, device=DEVICE).expand(B, P), text], 1)
    weight = torch.randn(V, E, device=DEVICE, dtype=HALF)
    virtual = torch.randn(P, E, device=DEVICE).requires_grad_(backward)
    grad = torch.randn(B, P + T, E, device=DEVICE, dtype=HALF)

    def ours() -> dict[str, torch.Tensor]:
        with torch.set_grad_enabled(backward):
            out = prefixcore.soft_embedding(ids, weight, virtual)
        return {"out": out, **({"grad": torch.autograd.grad(out, virtual, grad)[0]} if backward else {})}

    def embedding_and_cat() -> dict[str, torch.Tensor]:
        with torch.set_grad_enabled(backward):
            embedded = torch.nn.functional.embedding(text, weight)
            out = torch.cat([virtual.to(HALF).expand(B, P, E), embedded], 1)
        return {"out": out, **({"grad": torch.autograd.grad(out, virtual, grad)[0]} if backward else {})}

    want = embedding_and_cat()
    if backward:
        want["grad"] = grad[:, :P].double().sum(0)
    error = gate("soft_embedding", ours(), want, 1e-5)
    target = torch.empty_like(grad)
    whole = grad.numel() * HALF.itemsize
    measure(
        "gpu soft embedding",
        {"B": B, "T": T, "P": P, "V": V, "E": E, "backward": backward},
        ours,
        {"output copied": lambda: target.copy_(grad), "embedding + cat": embedding_and_cat},
        moves=2 * whole + (B * P * E * HALF.itemsize if backward else 0),
        relative_error=error,
        backend=backend.name,
    )
