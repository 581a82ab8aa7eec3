"""A short sequence's backward in two launches, through the op, against the float64 reference.

In Triton's interpreter, or on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import prefixcore
from prefixcore.backends.triton import use_path
from tests.device import DEVICE, NAME, triton_backend
from tests.ops.problems import Problem, check, run

pytest.importorskip("triton")

from prefixcore.backends.triton.kernels import grad_once, grad_prefix, launch


@pytest.fixture(autouse=True)
def short_path() -> Iterator[None]:
    with triton_backend(), use_path("short"):
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, ordinary_way: None) -> list[str]:
    """The kernels that were launched."""
    seen: list[str] = []
    real = launch.launch

    def watched(kernel: Any, programs: int, *arguments: Any, **named: Any) -> None:
        seen.extend([kernel.__name__] if programs else [])
        real(kernel, programs, *arguments, **named)

    monkeypatch.setattr(launch, "launch", watched)
    return seen


@pytest.mark.parametrize(("H", "Hkv"), [(3, 1), (4, 2), (2, 2)])
@pytest.mark.parametrize(("T", "P"), [(1, 1), (1, 63), (33, 20)])
def test_shapes(T: int, P: int, H: int, Hkv: int) -> None:
    check(Problem(B=1, T=T, P=P, H=H, Hkv=Hkv, D=16))


@pytest.mark.skipif(NAME != "cuda", reason="takes a minute where kernels are interpreted")
@pytest.mark.parametrize("D", [32, 64, 128])
def test_longer_sequences(D: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(Problem(B=3, T=333, P=63, H=6, Hkv=2, D=D, dtype=dtype), slack=2.0)


@pytest.mark.parametrize("D", [80, 256] if NAME != "cuda" else [64, 80, 96, 128, 256])
def test_head_dims(D: int) -> None:
    check(Problem(B=1, T=20, P=20, H=2, Hkv=1, D=D, heads_last=True))


OPTIONS: dict[str, dict[str, Any]] = {
    "bidirectional, more keys": {"is_causal": False, "S": 50},
    "fewer keys than queries": {"S": 9},
    "no keys": {"S": 0},
    "no prefix": {"P": 0},
    "bank": {"N": 3, "index": True, "lengths": True, "B": 4, "T": 9},
    "rows without a prefix": {"index": True, "B": 5, "T": 9},
    "padding": {"mask": "padding", "B": 4, "T": 9},
    "bool mask": {"mask": "bool"},
    "additive mask, softcap": {"mask": "additive", "softcap": 3.0, "gain": 4.0},
    "window, sinks": {"sliding_window": 7, "S": 45, "sinks": True},
    "packed, bank, window": {"packed": (5, 1, 0, 20), "N": 2, "index": True, "lengths": True, "sliding_window": 9},
    "head of 20, value of 7": {"D": 20, "Dv": 7},
    "heads last": {"heads_last": True},
    "large scores": {"gain": 30.0},
}


QUICK = ("fewer keys than queries", "bank", "packed, bank, window", "window, sinks")
"""`test_kernels.py` has the others, in smaller tiles; on a GPU all of them are tried here."""


@pytest.mark.parametrize(
    "option", [pytest.param(x, marks=[pytest.mark.slow] * (NAME != "cuda" and x not in QUICK)) for x in OPTIONS]
)
def test_options(option: str) -> None:
    check(Problem(**{"T": 20, "P": 20, "H": 2, "Hkv": 1, "D": 16, **OPTIONS[option]}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prefix_dtype", [None, torch.float32], ids=["", "float32 prefix"])
def test_half_precisions(dtype: torch.dtype, prefix_dtype: torch.dtype | None) -> None:
    check(Problem(B=1, T=20, P=20, D=16, dtype=dtype, prefix_dtype=prefix_dtype), slack=2.0)


def test_forward_in_one_launch_backward_in_two_and_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, launched: list[str]
) -> None:
    monkeypatch.setattr(grad_prefix, "TILES_PER_SPLIT", 1)  # a large problem's splits
    problem = Problem(B=3, T=17, P=20, H=4, Hkv=1, D=16)
    check(problem)
    launched.clear()
    first = run(problem)
    assert launched == ["forward_kernel", "grad_once_kernel", "reduce_both_kernel"]
    again = run(problem)
    assert all(torch.equal(x, again[name]) for name, x in first.items())


def test_of_few_queries_one_split_is_enough(launched: list[str]) -> None:
    check(Problem(B=1, T=5, P=20, H=2, Hkv=2, D=16))
    assert launched == ["forward_kernel", "grad_once_kernel"]


def test_of_what_nobody_wants_nothing_is_computed(monkeypatch: pytest.MonkeyPatch, ordinary_way: None) -> None:
    """The first layer of a frozen model wants the prefix's gradient alone, a frozen prefix none."""
    asked: list[tuple[bool, ...]] = []
    real = grad_once.launch_grad_once

    def watched(*arguments: Any, needs_prefix: bool) -> Any:
        asked.append((*(x is not None for x in arguments[5:]), needs_prefix))
        return real(*arguments, needs_prefix=needs_prefix)

    monkeypatch.setattr("prefixcore.backends.triton.single.launch_grad_once", watched)
    problem = Problem(T=17, P=20, D=16)
    whole = run(problem)
    for wanted in (("prefix_key", "prefix_value"), ("query",), ("key", "value")):
        tensors, _ = problem.tensors()
        leaves = {name: x.requires_grad_(name in wanted) for name, x in tensors.items()}
        out, lse = prefixcore.prefix_attention(**leaves, return_lse=True)
        g = torch.Generator().manual_seed(problem.seed + 1)
        grads = [torch.randn(x.shape, generator=g).to(x) for x in (out, lse)]
        torch.autograd.backward([out, lse], grads)
        for name, x in leaves.items():
            assert (x.grad is not None) == (name in wanted)
            assert x.grad is None or torch.equal(x.grad, whole[f"grad_{name}"]), name
    assert asked[1:] == [(False, False, False, True), (True, False, False, False), (False, True, True, False)]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a graph needs a GPU")
def test_in_a_cuda_graph() -> None:
    tensors, _ = Problem(B=8, H=9, Hkv=3, T=64, D=64, P=20, dtype=torch.bfloat16).tensors()
    leaves = [x.requires_grad_() for x in tensors.values()]

    def step() -> list[torch.Tensor]:
        out = prefixcore.prefix_attention(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(leaves[0]))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, step(), strict=True))
