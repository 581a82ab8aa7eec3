"""`soft_embedding` beside lookup-and-concatenate, and beside how fast this machine copies memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import prefixcore
from bench.attention_problem import NAMES
from bench.conftest import Measure
from bench.gates import gate
from bench.reference.embedding_and_cat import embedding_and_cat
from bench.scale import pick


@dataclass(frozen=True)
class Lookup:
    """B rows of T tokens after P virtual ones, from a table [V, E]."""

    B: int
    T: int
    P: int
    V: int
    E: int

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(ids of the text [B, T], ids with the prompt before them [B, P + T], table, prompt)."""
        g = torch.Generator().manual_seed(0)
        text = torch.randint(0, self.V, (self.B, self.T), generator=g)
        prompt = torch.arange(self.V, self.V + self.P).expand(self.B, -1)
        table = torch.randn(self.V, self.E, generator=g).to(dtype)
        virtual = torch.randn(self.P, self.E, generator=g).to(dtype)
        return text, torch.cat([prompt, text], 1), table, virtual


SHAPES = pick(
    smoke=[Lookup(2, 7, 3, 50, 16)],
    quick=[Lookup(4, 256, 20, 49152, 576), Lookup(1, 8, 20, 49152, 576)],
    full=[
        Lookup(4, 256, 20, 49152, 576),
        Lookup(8, 1024, 64, 49152, 576),
        Lookup(2, 1024, 64, 32000, 2048),
        Lookup(1, 4096, 512, 32000, 2048),
        Lookup(8, 8, 13, 49152, 576),
        Lookup(1, 8, 20, 49152, 576),
    ],
)


def name(shape: Any) -> str | None:
    return "-".join(map(str, asdict(shape).values())) if isinstance(shape, Lookup) else None


@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_soft_embedding(measure: Measure, shape: Lookup, dtype: str, backward: bool) -> None:
    text, with_prompt, table, virtual = shape.tensors(NAMES[dtype])
    virtual.requires_grad_(backward)
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(shape.B, shape.P + shape.T, shape.E, generator=g).to(NAMES[dtype])

    def ours() -> dict[str, Tensor]:
        return solve(prefixcore.soft_embedding(with_prompt, table, virtual))

    def theirs() -> dict[str, Tensor]:
        return solve(embedding_and_cat(text, table, virtual))

    def solve(out: Tensor) -> dict[str, Tensor]:
        results = {"out": out.detach()}
        if backward:
            (results["grad"],) = torch.autograd.grad(out, virtual, grad)
        return results

    # A lookup copies: exact. The gradient in float64 is the sum over the rows of the batch.
    exact = torch.cat([virtual.detach().expand(shape.B, -1, -1), table[text]], 1)
    want = {"out": exact, **({"grad": grad[:, : shape.P].double().sum(0)} if backward else {})}
    tolerance = 1e-6 if dtype == "fp32" else 5e-3
    error = gate("soft_embedding", ours(), want, tolerance)
    gate("embedding and cat", theirs(), want, tolerance)
    assert torch.equal(ours()["out"], exact)

    target, source = torch.empty_like(exact), exact.clone()
    measure(
        "soft embedding",
        {**asdict(shape), "dtype": dtype, "backward": backward},
        ours,
        # "copy" writes into memory that is there already; "clone" asks for new memory, as a lookup has to.
        {"embedding and cat": theirs, "copy": lambda: target.copy_(source), "clone": source.clone},
        relative_error=error,
    )
