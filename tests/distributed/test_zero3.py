"""DeepSpeed's ZeRO-3 in two processes, where it is installed: what one process computes of the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import prefixcore
from tests import tiny
from tests.distributed import launch
from tests.distributed.training import CONFIGS, IDS, train


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    ranks = launch.run("zero3", tmp_path)
    for rank in ranks:
        for why in rank.pop("why no average"):
            assert why.startswith("several processes have the parameters in parts (FSDP2 or DeepSpeed's ZeRO-3)")
    for case in ranks[0]:
        handle = prefixcore.attach(tiny.model(), CONFIGS[case.split(",")[0]])
        losses = train(handle, handle.model, IDS)["losses"]
        means = [(a + b) / 2 for a, b in zip(ranks[0][case], ranks[1][case], strict=True)]
        assert means == pytest.approx(losses, abs=1e-6), case
        with prefixcore.load(tiny.model(), tmp_path / case, trainable=True) as loaded:
            for got, expected in zip(loaded.parameters(), handle.parameters(), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=f"{case}: {{}}".format)
