"""What the tests of the ops share: each backend, a good call, and memory that is gone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import prefixcore
from tests.device import triton_backend

__all__ = ["backend"]

OPS = torch.ops.prefixcore
BACKENDS = ("cpu", "reference", "triton")
"""The triton backend stands in the cpu backend's place, interpreted."""


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param != "triton":
        with prefixcore.use_backend(request.param):
            yield request.param
        return
    pytest.importorskip("triton")
    with triton_backend():
        yield "triton"


def good(**changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = {"query": (2, 4, 5, 8), "key": (2, 2, 5, 8), "value": (2, 2, 5, 8), "prefix_key": (2, 3, 8)}
    call = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return {**call, "prefix_value": torch.randn(2, 3, 8, generator=g), **changes}


def freed(x: Tensor, left: int = 0) -> Tensor:
    """`x` as FSDP leaves what it has sharded: its shape, and no memory, or too little."""
    x = x.clone()
    x.untyped_storage().resize_(left)
    return x


GONE = r"{}: expected memory for the shape .*freed or shrunk; if FSDP shards it, unshard\(\) it first"
