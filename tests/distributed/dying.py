"""Run by torchrun: trains and saves after every step without an end, until a process of it dies or is told to stop."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import prefixcore
from tests import tiny
from tests.distributed.training import CONFIGS, IDS


def main(folder: str, how: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    handle = prefixcore.attach(tiny.model(), CONFIGS["prefix"])
    step = by_stages(handle) if how == "pipeline" else by_batches(handle, rank, how)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.01)
    (Path(folder) / f"pid-{rank}").write_text(str(os.getpid()))
    while True:
        step()
        optimizer.step()
        optimizer.zero_grad()
        if how == "fsdp" or rank == 0:
            handle.save(Path(folder) / "adapter")
        time.sleep(0.01)


def by_batches(handle: Any, rank: int, how: str) -> Callable[[], None]:
    """Makes gradients of a batch of its own in each process."""
    run, ids = handle.model.train(), IDS[rank : rank + 1]
    if how == "fsdp":
        fully_shard(run, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    else:
        run = torch.nn.parallel.DistributedDataParallel(run)
    return lambda: run(input_ids=ids, labels=ids).loss.backward()


def by_stages(handle: Any) -> Callable[[], None]:
    """Makes gradients of one batch in all processes, each of which has some of the layers."""
    stage = prefixcore.pipeline_stage(handle)
    place = PipelineStage(stage, stage.index, stage.count, torch.device("cpu"))
    loss = partial(handle.model.loss_function, vocab_size=handle.model.config.vocab_size)
    schedule = ScheduleGPipe(place, n_microbatches=2, loss_fn=loss)

    def step() -> None:
        schedule.step(input_ids=IDS, target=IDS)
        stage.sum_gradients()

    return step


if __name__ == "__main__":
    main(*sys.argv[1:])
