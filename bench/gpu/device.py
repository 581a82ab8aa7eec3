"""What is measured on: `PREFIXCORE_BENCH_DEVICE` is `cuda`; or, for a rehearsal without a GPU, `interpreter`, which
runs Triton's kernels on the CPU, slowly, or `cpu`, where the CPU's own are called in their place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .parts import switched

NAME = os.environ.get("PREFIXCORE_BENCH_DEVICE", "")
if NAME not in ("", "cuda", "interpreter", "cpu"):
    raise ValueError(f"PREFIXCORE_BENCH_DEVICE: expected cuda, interpreter or cpu, got {NAME!r}")
if NAME in ("interpreter", "cpu"):
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = torch.device("cuda" if NAME == "cuda" else "cpu")
REAL = NAME == "cuda"
HALF = torch.bfloat16 if REAL else torch.float32
"""The dtype that is measured; a rehearsal computes in float32, which the interpreter knows best."""
SWITCHED = switched(os.environ)
"""What of the Triton backend is on that is off until a GPU has run it, in words."""
COMPILER = {"cuda": "inductor", "interpreter": "aot_eager"}.get(NAME, "eager")
"""Whose code `torch.compile` runs; a rehearsal traces as Inductor does and compiles nothing."""


@contextmanager
def triton_backend() -> Iterator[None]:
    from prefixcore.backends import triton

    registered = None if NAME != "interpreter" else triton.register("CPU")
    try:
        yield
    finally:
        if registered is not None:
            registered._destroy()


def describe() -> str:
    if not REAL:
        return "rehearsal without a GPU: figures mean nothing"
    facts = torch.cuda.get_device_properties(DEVICE)
    return f"{facts.name}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
