"""Where the tests of the ops run. ``PREFIXCORE_TEST_DEVICE`` is

* ``cpu`` (the default): CPU tensors, the cpu backend;
* ``cuda``: CUDA tensors, the triton backend: the whole matrix on real hardware;
* ``interpreter``: CPU tensors, the triton backend with Triton's interpreter and PyTorch's CPU flash attention in the
  fused attention's place: the same matrix as far as a CPU goes. Slow.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

NAMES = ("cpu", "cuda", "interpreter")
NAME = os.environ.get("PREFIXCORE_TEST_DEVICE", "cpu")
if NAME not in NAMES:
    raise ValueError(f"PREFIXCORE_TEST_DEVICE: expected one of {', '.join(NAMES)}, got {NAME!r}")
DEVICE = torch.device("cuda" if NAME == "cuda" else "cpu")
if NAME == "cuda" and not torch.cuda.is_available():
    raise RuntimeError("PREFIXCORE_TEST_DEVICE=cuda, but PyTorch finds no GPU")

EXAMPLES = {"cpu": 1.0, "interpreter": 0.1, "cuda": 0.03}[NAME]
"""The share of hypothesis' examples that is tried: Triton compiles, or interprets, its kernels for each head dim."""

cpu_backend = pytest.mark.skipif(NAME != "cpu", reason="what it tests belongs to the CPU backend")


@contextmanager
def triton_backend() -> Iterator[None]:
    """The triton backend computes the tensors of ``DEVICE``, interpreted where they are on the CPU."""
    # Here and not above: the sanitizers run a copy of the tests that has no benchmarks.
    from bench.gpu.environment import lacking_to_interpret
    from prefixcore.backends import triton

    if DEVICE.type == "cpu" and (wanted := lacking_to_interpret()):
        pytest.skip(f"the interpreter of Triton before 3.7 needs {', '.join(wanted)}")
    registered = triton.register("CPU") if DEVICE.type == "cpu" else None
    try:
        yield
    finally:
        if registered is not None:
            registered._destroy()


def examples(count: int) -> int:
    return max(1, round(EXAMPLES * count))


def shard(items: list[pytest.Item], which: str) -> list[pytest.Item]:
    """Of all tests those that `which`, "2/8" for the third of eight processes, is to run."""
    index, count = (int(number) for number in which.split("/"))
    return items[index::count]
