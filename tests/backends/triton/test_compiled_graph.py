"""Under `torch.compile` on a GPU that is not there: fake CUDA tensors, captured whole, and how often it compiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import prefixcore
from prefixcore.backends import nvidia
from tests.device import NAME

pytestmark = pytest.mark.skipif(NAME == "cuda", reason="test_on_device.py and test_replay_on_device.py compile there")

LENGTHS = (7, 8, 16, 17, 33, 64, 100, 128, 130, 512)


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(nvidia, "_machine", [nvidia.Machine(None, (9, 0))])
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def attend(query: Tensor, key: Tensor, value: Tensor, prefix: Tensor, padding: Tensor | None = None) -> Tensor:
    return prefixcore.prefix_attention(query, key, value, prefix, prefix, attn_mask=padding) * 2


def call(f: Any, device: str, queries: int, keys: int, padded: bool = False) -> Tensor:
    query = torch.randn(2, 4, queries, 16, device=device)
    key, value = torch.randn(2, 2, 2, keys, 16, device=device)
    prefix = torch.randn(2, 5, 16, device=device)
    padding = torch.ones(2, keys, dtype=torch.bool, device=device) if padded else None
    out: Tensor = f(query, key, value, prefix, padding)
    assert out.shape == query.shape
    assert out.device.type == device
    return out


@pytest.mark.parametrize(
    ("device", "padded"),
    [("cpu", False), ("cpu", True), ("cuda", False)],  # a PyTorch without CUDA cannot index fake CUDA tensors
)
def test_lengths_are_not_compiled_one_by_one(device: str, padded: bool) -> None:
    """The first length, and then one graph for all others."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    with FakeTensorMode() if device == "cuda" else nullcontext():
        for length in LENGTHS:
            call(compiled, device, length, length, padded)
    assert counter.frame_count == 2
    targets = [str(node.target) for node in counter.graphs[-1].graph.nodes]
    assert "prefixcore.prefix_attention" in targets, "one node, which replay and CUDA graphs take as it is"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_cache_that_grows_is_compiled_twice(device: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    with FakeTensorMode() if device == "cuda" else nullcontext():
        for length in range(20, 30):
            call(compiled, device, 1, length)
    assert counter.frame_count == 2


def test_a_length_that_is_marked_is_compiled_once() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    for length in LENGTHS:
        query, key = torch.randn(2, 4, length, 16), torch.randn(2, 2, length, 16)
        for x in (query, key):
            torch._dynamo.mark_dynamic(x, 2)
        compiled(query, key, key, torch.randn(2, 5, 16))
    assert counter.frame_count == 1


def test_training_does_not_compile_at_each_length_either() -> None:
    """Forward and backward, on the CPU: autograd wants a device that is there."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    prefix = torch.randn(2, 5, 16, requires_grad=True)
    for length in LENGTHS[:6]:
        query, key = torch.randn(2, 4, length, 16), torch.randn(2, 2, length, 16)
        got = torch.autograd.grad(compiled(query, key, key, prefix).sum(), prefix)
        want = torch.autograd.grad(attend(query, key, key, prefix).sum(), prefix)
        torch.testing.assert_close(got, want)
    assert counter.frame_count == 2
