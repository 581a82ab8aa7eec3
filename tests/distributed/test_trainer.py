"""transformers' Trainer in two processes and in one: the same training, also where the number changes on the way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import prefixcore
from tests import tiny
from tests.distributed import launch
from tests.distributed.trainer import main

STEPS = 6


def run(folder: Path, runs: str, processes: int, steps: int, resume: bool = False) -> list[Mapping[str, Any]]:
    arguments = folder / runs, str(steps), "resume" if resume else "new"
    if processes > 1:
        return launch.run("trainer", folder, *arguments, processes=processes)
    main(str(folder), *map(str, arguments))
    return [torch.load(folder / "rank-0.pt", weights_only=True)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    [found] = run(tmp_path_factory.mktemp("alone"), "runs", 1, STEPS)
    return found


@pytest.mark.slow
def test_a_training_goes_on_with_another_number_of_processes(alone: Any, tmp_path: Path) -> None:
    """Two processes, one, and two again: each step is that of one process all along."""
    first = run(tmp_path, "runs", 2, 2)
    one = run(tmp_path, "runs", 1, 4, resume=True)
    last = run(tmp_path, "runs", 2, STEPS, resume=True)
    assert len(alone["losses"]) == STEPS
    for found, upto in ((first, 2), (one, 4), (last, STEPS)):
        for rank in found:
            assert rank["losses"] == pytest.approx(alone["losses"][:upto], abs=2e-6)
    for mine, others, expected in zip(last[0]["values"], last[1]["values"], alone["values"], strict=True):
        assert torch.equal(mine, others), "the processes have the same bits"
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
    with prefixcore.load(tiny.model(), tmp_path / "runs" / "saved", trainable=True) as handle:
        for got, trained in zip(handle.parameters(), last[0]["values"], strict=True):
            assert torch.equal(got, trained)
