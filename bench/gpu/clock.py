"""GPU time, between two events on the stream, of calls in turns; and calls without the time to launch them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from bench.scale import MIN_ROUNDS, SCALE
from bench.timing import Call, ratio, summary

from .device import DEVICE, REAL

ROUNDS = {"smoke": MIN_ROUNDS, "quick": 15, "full": 61}[SCALE]
LONG = 0.1  # seconds: of a call that takes longer, fewer rounds say as much


@cache
def _more_than_the_cache() -> torch.Tensor:
    return torch.empty(2**28, dtype=torch.int8, device=DEVICE)


def seconds(call: Call, cold: bool = False) -> float:
    """Of one call. `cold`: with nothing of what it reads left in the L2 cache."""
    if not REAL:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    if cold:
        _more_than_the_cache().zero_()
    torch.cuda._sleep(4_000_000)  # cycles in which the call is launched: gaps between launches are not what is timed
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(calls: Mapping[str, Call], cold: bool) -> dict[str, Any]:
    """``{"rounds", "seconds": {name: summary}, "ratios": {reference: ratio}}``; ``candidate`` is among `calls`."""
    for _ in range(1 if SCALE == "smoke" else 3):  # compiles, tunes, plans
        longest = max(seconds(call, cold) for call in calls.values())
    rounds = ROUNDS if longest < LONG else max(MIN_ROUNDS, ROUNDS // 3)
    found: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(seconds(calls[name], cold))
    mine = found["candidate"]
    return {
        "rounds": rounds,
        "seconds": {name: summary(times) for name, times in found.items()},
        "ratios": {name: ratio(mine, times) for name, times in found.items() if name != "candidate"},
    }


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
