"""Clocks, for calls in turns: the GPU's own time, a step's time on the wall, and the CPU's time to launch a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from bench.scale import MIN_ROUNDS, SCALE
from bench.timing import Call, ratio, seconds_of, summary

from .device import DEVICE, REAL

ROUNDS = {"smoke": MIN_ROUNDS, "quick": 15, "full": 61}[SCALE]
LAUNCHES = 32  # calls that are launched one after the other: fewer kernels than the driver's queue takes
LAUNCHING = 150_000_000  # cycles, 75 ms: longer than launching them takes
LONG = 0.1  # seconds: of a call that takes longer, fewer rounds say as much


@cache
def _more_than_the_cache() -> torch.Tensor:
    return torch.empty(2**28, dtype=torch.int8, device=DEVICE)


Clock = Callable[[Call], float]
"""Seconds of one call."""


def seconds(call: Call) -> float:
    """The GPU's, between two events on the stream, with what the last call read still in the L2 cache."""
    if not REAL:
        return seconds_of(call)
    torch.cuda._sleep(4_000_000)  # cycles in which the call is launched: gaps between launches are not what is timed
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def cold_seconds(call: Call) -> float:
    """The GPU's, with nothing of what the call reads left in the L2 cache."""
    if REAL:
        _more_than_the_cache().zero_()
    return seconds(call)


def wall_seconds(call: Call) -> float:
    """On the wall, from launching to the end: what a loop of small steps waits for."""
    if not REAL:
        return seconds_of(call)

    def whole() -> None:
        call()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return seconds_of(whole)


def launch_seconds(call: Call) -> float:
    """The CPU's, to launch one of `LAUNCHES` calls; meanwhile the GPU is busy, so that nothing waits for it."""
    if not REAL:
        return seconds_of(call)
    torch.cuda.synchronize()
    torch.cuda._sleep(LAUNCHING)

    def several() -> None:
        for _ in range(LAUNCHES):
            call()

    took = seconds_of(several)
    torch.cuda.synchronize()
    return took / LAUNCHES


def interleaved(calls: Mapping[str, Call], seconds: Clock) -> dict[str, Any]:
    """`{"rounds", "seconds": {name: summary}, "ratios": {reference: ratio}}`; `candidate` is among `calls`."""
    for _ in range(1 if SCALE == "smoke" else 3):  # compiles, tunes, plans
        longest = max(seconds(call) for call in calls.values())
    rounds = ROUNDS if longest < LONG else max(MIN_ROUNDS, ROUNDS // 3)
    found: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(seconds(calls[name]))
    mine = found["candidate"]
    return {
        "rounds": rounds,
        "seconds": {name: summary(times) for name, times in found.items()},
        "ratios": {name: ratio(mine, times) for name, times in found.items() if name != "candidate"},
    }


def kernels(call: Call) -> int | None:
    """How many kernels a call launches; None where the profiler cannot see them."""
    if not REAL:
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in found.events()) or None


def graphed(call: Call) -> Call:
    """`call` captured in a CUDA graph: the GPU's work alone, as serving runs it, without the CPU's time to launch."""
    if not REAL:
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(kept: Call = call) -> None:
        """Keeps the call, too: the graph reads its tensors, which would be freed with it."""
        graph.replay()

    return replay


def copy_rate() -> float:
    """Bytes a second, read and written, of a large copy: what memory gives in practice."""
    source = torch.empty(2**30 if REAL else 2**20, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(seconds(lambda: target.copy_(source)) for _ in range(7))
