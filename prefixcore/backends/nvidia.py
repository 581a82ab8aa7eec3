"""What NVIDIA GPUs are here, for the backends that run on them: looked at once, when somebody first asks."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

Capability = tuple[int, int]


class Machine(NamedTuple):
    """Why no GPU can be used, if so, and the highest compute capability there is."""

    problem: str | None
    newest: Capability


def _look_at_the_machine() -> Machine:
    if torch.version.hip is not None:
        return Machine("it has been written for NVIDIA's GPUs, and this PyTorch is for AMD's", (0, 0))
    if not torch.cuda.is_available():
        return Machine("no GPU is there", (0, 0))
    return Machine(None, max(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())))


_look_at_the_machine._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile is not to trace it

_machine: list[Machine] = []


def machine() -> Machine:
    """What is here. Empty the list `_machine`, and it is looked at anew."""
    if not _machine:
        _machine.append(_look_at_the_machine())
    return _machine[0]


def too_old(capability: Capability, oldest: Capability) -> str | None:
    """Why kernels for `oldest` and later do not run on a GPU of `capability`; None if they do."""
    if oldest <= capability:  # torch 2.11 does not compile the same comparison turned round
        return None
    return "it needs compute capability {}.{}, and the GPU has {}.{}".format(*oldest, *capability)


def streamed_embedding() -> bool:
    """Whether the soft embedding is looked up by the kernels that stream the table, which no GPU has run yet.

    The C++ (`csrc/cuda/embedding.cu`) reads the same variable. ValueError: it says neither 0 nor 1.
    """
    word = os.environ.get("PREFIXCORE_STREAMED_EMBEDDING") or "0"
    if word not in ("0", "1"):
        raise ValueError(f"PREFIXCORE_STREAMED_EMBEDDING: expected 0 or 1, got {word!r}")
    return word == "1"
