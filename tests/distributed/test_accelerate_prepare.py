"""Two processes that Accelerate has prepared, by DDP and by FSDP2: what one process computes of the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import prefixcore
from tests import tiny
from tests.distributed import launch
from tests.distributed.accelerate_prepare import CASES, CONFIGS, train
from tests.distributed.training import IDS, assert_same_training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("accelerate")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Mapping[str, Any]]:
    return launch.run("accelerate_prepare", folder)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process makes of both rows."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    found = {}
    for name, config in CONFIGS.items():
        found[name] = train(Accelerator(cpu=True), prefixcore.attach(tiny.model(), config), IDS)
    AcceleratorState._reset_state(reset_partial_state=True)
    return found


@pytest.mark.parametrize(("name", "how"), CASES)
def test_two_processes_train_as_one(ranks: Any, alone: Any, folder: Path, name: str, how: str) -> None:
    mine = [rank[f"{name} {how}"] for rank in ranks]
    assert_same_training(mine, alone[name], f"{name} {how}")
    for rank in mine:
        assert rank["measured"] == pytest.approx(alone[name]["measured"], rel=1e-4, abs=1e-7)
    with prefixcore.load(tiny.model(), folder / f"{name} {how}", trainable=True) as loaded:
        for got, trained in zip(loaded.parameters(), mine[0]["values"], strict=True):
            assert torch.equal(got, trained), "what is saved is what was trained"


@pytest.mark.parametrize(("name", "how"), CASES)
def test_the_tracker_has_what_was_measured_once(ranks: Any, folder: Path, name: str, how: str) -> None:
    expected = ranks[0][f"{name} {how}"]["measured"]
    assert any("attention" in key for key in expected) == ("prompt" not in name)
    [events] = (folder / "logs" / f"{name} {how}").rglob("events*")
    found = EventAccumulator(str(events.parent)).Reload()
    for key, value in expected.items():
        assert found.Scalars(key)[0].step == 1
        assert found.Scalars(key)[0].value == pytest.approx(value, rel=1e-6)
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3]
