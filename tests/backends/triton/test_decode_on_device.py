"""What only a GPU can show of a decode in one launch: who ends last is chance, streams and graphs run side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import prefixcore
from prefixcore.backends.triton import use_path
from tests.device import DEVICE, NAME
from tests.ops.problems import Problem, check, relative_error

pytestmark = pytest.mark.skipif(NAME != "cuda", reason="needs a GPU: PREFIXCORE_TEST_DEVICE=cuda")

BF16 = torch.bfloat16
WORK: dict[str, Problem] = {
    "shared, long": Problem(B=32, H=32, Hkv=8, T=1, S=512, P=2048, D=128, dtype=BF16, heads_last=True),
    "shared, few keys": Problem(B=32, H=8, Hkv=2, T=1, S=16, P=4096, D=128, dtype=BF16),
    "shared bank": Problem(B=24, N=2, H=8, Hkv=2, T=1, S=300, P=1000, D=64, index=True, lengths=True, dtype=BF16),
    "some rows without a prefix": Problem(B=16, H=8, Hkv=8, T=2, S=700, P=600, D=64, index=True, dtype=torch.float16),
    "own, split": Problem(B=1, H=32, Hkv=8, T=1, S=5000, P=20, D=128, dtype=BF16),
    "own, one split": Problem(B=8, H=9, Hkv=3, T=1, S=64, P=20, D=64, dtype=BF16),
    "large bank": Problem(B=8, N=16, H=8, Hkv=2, T=1, S=900, P=300, D=80, index=True, dtype=BF16),
    "float32": Problem(B=8, H=8, Hkv=2, T=3, S=400, P=500, D=64),
    "window, softcap, sinks": Problem(
        B=8, H=8, Hkv=2, T=2, S=3000, P=512, D=128, sliding_window=700, softcap=20.0, sinks=True, dtype=BF16
    ),
    "padding": Problem(B=9, H=8, Hkv=2, T=1, S=777, P=300, D=96, mask="padding", dtype=BF16),
    "mask": Problem(B=8, H=4, Hkv=4, T=4, S=600, P=300, D=64, mask="additive", dtype=BF16),
    "many heads a group": Problem(B=4, H=64, Hkv=1, T=4, S=600, P=700, D=64, dtype=BF16),
    "head of 256": Problem(B=4, H=8, Hkv=4, T=1, S=900, P=300, D=256, dtype=BF16),
}


def arguments(work: str) -> dict[str, Any]:
    tensors, options = WORK[work].tensors()
    return tensors | options


def decoded(given: dict[str, Any], path: str = "decode_once") -> tuple[Tensor, Tensor]:
    with torch.no_grad(), use_path(path):
        return prefixcore.prefix_attention(**given, return_lse=True)


@pytest.mark.parametrize("work", WORK)
def test_against_the_reference(work: str) -> None:
    with use_path("decode_once"):
        check(WORK[work], slack=2.0)


@pytest.mark.parametrize("work", WORK)
def test_the_same_bits_two_hundred_times(work: str) -> None:
    """Programs end in another order each time; a counter that was not put back, or a late store, would show."""
    given = arguments(work)
    first = decoded(given)
    with torch.no_grad(), use_path("decode"):
        other = prefixcore.prefix_attention(**given)
    assert relative_error(first[0], other) < 1e-2
    different = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(200):
        for x, y in zip(decoded(given), first, strict=True):
            different += (x != y).sum()
    assert not different.item()


def test_streams_side_by_side() -> None:
    """Each has counters of its own; scratch is each launch's own."""
    names = ("shared, few keys", "own, split", "shared bank")
    given = {name: arguments(name) for name in names}
    want = {name: decoded(given[name])[0] for name in names}
    streams = {name: torch.cuda.Stream() for name in names}
    torch.cuda.synchronize()
    got: dict[str, list[Tensor]] = {name: [] for name in names}
    for _ in range(50):
        for name, stream in streams.items():
            with torch.cuda.stream(stream):
                got[name].append(decoded(given[name])[0])
    torch.cuda.synchronize()
    for name in names:
        assert all(torch.equal(x, want[name]) for x in got[name]), name


def test_graphs_beside_one_another_and_beside_what_is_no_graph() -> None:
    """Two graphs of one stream, replayed on two others while that one goes on; inputs change between replays."""
    given = arguments("shared, few keys")
    home = torch.cuda.Stream()
    home.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(home):
        decoded(given)
    torch.cuda.synchronize()
    graphs, outs = [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=home):
            outs.append(decoded(given)[0])
        graphs.append(graph)
    others = [torch.cuda.Stream() for _ in graphs]
    for seed in range(5):
        torch.manual_seed(seed)
        given["query"].copy_(torch.randn_like(given["query"]))
        want = decoded(given)[0]
        torch.cuda.synchronize()
        eager = []
        for _ in range(20):
            for graph, stream in zip(graphs, others, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
            with torch.cuda.stream(home):
                eager.append(decoded(given)[0])
        torch.cuda.synchronize()
        assert all(torch.equal(x, want) for x in (*outs, *eager)), seed


def test_nothing_is_set_to_zero_by_a_launch_of_its_own() -> None:
    given = arguments("shared, few keys")
    decoded(given)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        decoded(given)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert [name for name in kernels if "decode_once" in name or "Memset" in name or "fill" in name.lower()] == [
        "decode_once_kernel"
    ]


def test_compiled_with_graphs_from_the_first_call_on() -> None:
    """What a first run allocates there is checked and handed back; counters are not to be among it."""
    from prefixcore.backends.triton.kernels import counters

    counters._rooms.clear()
    torch._dynamo.reset()
    given = arguments("own, split")
    want = decoded(given)[0]
    counters._rooms.clear()
    compiled = torch.compile(prefixcore.prefix_attention, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        with torch.no_grad(), use_path("decode_once"):
            torch.compiler.cudagraph_mark_step_begin()
            got = compiled(**given).clone()
        assert torch.equal(got, want)
