"""What the text costs each request: seconds until the first token, with it and without."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ROUNDS = 5


def prefill_seconds(model: Any, ids: Sequence[int]) -> Callable[[], float]:
    """A call that reads `ids` once, as one request that has nothing in a cache, and returns the seconds."""
    batch = torch.tensor([list(ids)], device=model.device)

    @torch.no_grad()
    def read() -> float:
        wait(model)
        began = time.perf_counter()
        output: Tensor = model(input_ids=batch, use_cache=True).logits
        output[0, -1].argmax().item()
        return time.perf_counter() - began

    return read


def wait(model: Any) -> None:
    """Until a GPU has done what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def median(read: Callable[[], float]) -> float:
    """The median of a few reads, after one that warms up."""
    read()
    return statistics.median(read() for _ in range(ROUNDS))
