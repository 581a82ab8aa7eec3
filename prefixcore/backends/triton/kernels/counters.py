"""Counters that are zero whenever a kernel finds them, without a launch that makes them so.

A kernel whose programs count their arrivals leaves its counters at zero, as it found them, for the number of arrivals
depends on shapes alone. So they need setting to zero once; what has to be seen to is that no two kernels that may run
at the same time are given the same ones:
* kernels on one stream run one after the other, so a stream has counters of its own;
* a captured graph may be replayed on any stream, beside anything, but never beside itself: each captured launch gets
  counters that nobody else ever gets, from a room that was set to zero before the capture. Where a process has
  captured so much that the room is full, or nothing has run before the first capture, the graph sets its own to zero
  each time, which is one more node in it.

What is kept must not lie in a memory pool that somebody else is about to hand back or to check, as `torch.compile` with
CUDA graphs does with all that a first run allocates: on its stream, or in its thread. So it is allocated, and set to
zero, in a thread of its own on the default stream; whoever asks first on a stream waits for that, once.

A kernel that did not run to its end has taken the whole context with it, and no counter outlives that.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

CAPTURED = 1 << 19
"""Counters for captured launches, 2 MiB a device: 60 captured graphs of 32 layers with 256 counters a layer."""
_LEAST = 4096


class _Room:
    """A device's counters: those of each stream, and what is left for captures."""

    def __init__(self, device: torch.device) -> None:
        self.of_streams: dict[int, Tensor] = {}
        self.outgrown: list[Tensor] = []  # what still runs may count in them
        self.for_captures = kept_zeros(CAPTURED, device) if device.type == "cuda" else None
        self.taken = 0

    def for_capture(self, count: int) -> Tensor | None:
        if self.for_captures is None or self.taken + count > CAPTURED:
            return None
        self.taken += count
        return self.for_captures[self.taken - count : self.taken]


_rooms: dict[torch.device, _Room] = {}
_lock = threading.Lock()


def zeroed_counters(on: Tensor, count: int) -> Tensor:
    """At least `count` int32 zeros on the device of `on`, for one launch on the current stream that leaves zeros."""
    device = on.device
    stream, capturing = 0, False
    if on.is_cuda:
        stream = torch.cuda.current_stream(device).cuda_stream
        capturing = torch.cuda.is_current_stream_capturing()
    room = _rooms.get(device)
    if capturing:
        with _lock:
            found = None if room is None else room.for_capture(count)
        return torch.zeros(count, dtype=torch.int32, device=device) if found is None else found
    if room is not None:
        found = room.of_streams.get(stream)
        if found is not None and found.numel() >= count:
            return found
    with _lock:
        room = _rooms.get(device)
        if room is None:
            room = _rooms[device] = _Room(device)
        if (small := room.of_streams.get(stream)) is not None:
            room.outgrown.append(small)
        found = room.of_streams[stream] = kept_zeros(max(_LEAST, 2 * count), device)
    return found


def kept_zeros(count: int, device: torch.device) -> Tensor:
    """int32 zeros outside of any pool of the caller's, there for every stream."""
    with ThreadPoolExecutor(1) as other:
        return other.submit(_zeros, count, device).result()


def _zeros(count: int, device: torch.device) -> Tensor:
    zeros = torch.zeros(count, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return zeros
