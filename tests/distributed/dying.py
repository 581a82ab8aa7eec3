"""Run by torchrun: trains and saves after every step without an end, until a process of it dies or is told to stop."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import prefixcore
from tests import tiny
from tests.distributed.training import CONFIGS, IDS


def main(folder: str, how: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    handle = prefixcore.attach(tiny.model(), CONFIGS["prefix"])
    run = handle.model.train()
    if how == "fsdp":
        fully_shard(run, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    else:
        run = torch.nn.parallel.DistributedDataParallel(run)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.01)
    (Path(folder) / f"pid-{rank}").write_text(str(os.getpid()))
    while True:
        ids = IDS[rank : rank + 1]
        run(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if how == "fsdp" or rank == 0:
            handle.save(Path(folder) / "adapter")
        time.sleep(0.01)


if __name__ == "__main__":
    main(*sys.argv[1:])
