"""Run by torchrun: each process trains on its row of the batch, by DDP and by FSDP2."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import context_parallel

import prefixcore
from tests import tiny
from tests.distributed.launch import report
from tests.distributed.training import CONFIGS, IDS, train

HOW = ("ddp", "fsdp", "fsdp, prefix left out", "fsdp before attach")


def shard(model: Any, mesh: Any, **how: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, **how)


def prepare(name: str, how: str, mesh: Any) -> tuple[Any, Any]:
    """A handle, and what is called to train it."""
    model = tiny.model()
    if how == "fsdp before attach":
        shard(model, mesh)
    handle = prefixcore.attach(model, CONFIGS[name])
    if how == "ddp":
        return handle, torch.nn.parallel.DistributedDataParallel(model)
    if how == "fsdp":
        shard(model, mesh)
    if how == "fsdp, prefix left out":
        shard(model, mesh, ignored_params=set(handle.parameters()))
    return handle, model


def refused(mesh: Any) -> dict[str, str]:
    """What is said inside of torch's context parallelism."""
    said = {}
    for name in ("prefix", "prompt"):
        with prefixcore.attach(tiny.model(), CONFIGS[name]) as handle:
            ids = torch.arange(16)[None]
            with context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]):
                try:
                    handle.model(ids)
                except NotImplementedError as error:
                    said[name] = str(error)
    return said


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {}
    for name in CONFIGS:
        for how in HOW:
            handle, run = prepare(name, how, mesh)
            found[f"{name} {how}"] = train(handle, run, IDS[rank : rank + 1])
            handle.save(f"{folder}/{name} {how}")
    # Nobody gave a seed, and what FSDP does not know of must still be the same everywhere.
    for kind in (prefixcore.PrefixTuningConfig, prefixcore.PromptTuningConfig):
        model = tiny.model()
        shard(model, mesh)
        torch.manual_seed(rank)
        handle = prefixcore.attach(model, kind(3, init="random"))
        found[kind.__name__] = [parameter.detach().clone() for parameter in handle.parameters()]
    found["refused"] = refused(mesh)
    report(folder, rank, found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
