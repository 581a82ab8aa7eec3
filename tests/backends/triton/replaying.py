"""What the tests of replays share: a small problem, a path of the test's own that is recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixcore.backends.triton import replay
from tests.device import DEVICE
from tests.ops.problems import Problem

WITHOUT_GPU = [
    pytest.mark.skipif(DEVICE.type == "cuda", reason="test_replay_on_device.py runs where there is a GPU"),
    pytest.mark.usefixtures("triton"),
]
"""What marks each file of them."""

SMALL = Problem(B=2, H=2, Hkv=1, T=5, P=3, D=16)
LEAST = replace(SMALL, B=1, T=3, P=2)


def count() -> int:
    return len(replay.kept())


def small_tensors(**changes: Any) -> dict[str, Tensor]:
    return replace(SMALL, **changes).tensors()[0]


def run_recorded(path: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    def as_embedding_backward(grad: Tensor, ids: Tensor, vocabulary: int, num_virtual: int) -> Tensor:
        return path(grad)

    result: Tensor = replay.run("soft_embedding_backward", as_embedding_backward, (x, torch.zeros(1).long(), 1, 1))
    return result


KEPT_ELSEWHERE = torch.ones(3)

NOT_KEPT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "looks at a value": (lambda x: x + x.sum().item(), "aten::_local_scalar_dense looks at what is in a tensor"),
    "uses another tensor": (lambda x: x + KEPT_ELSEWHERE, "neither an argument nor made by the call"),
    "returns an argument": (lambda x: x, "it returns an argument"),
}
