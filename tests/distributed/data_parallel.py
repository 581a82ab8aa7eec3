"""Run by torchrun: each process trains on its row of the batch, by DDP and by FSDP2."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import context_parallel

import prefixcore
from prefixcore.hf.baking.publishing import Publisher
from tests import tiny
from tests.distributed.launch import leave, report
from tests.distributed.training import CONFIGS, IDS, train, why_no_average
from tests.hub.server import TOKEN, only, serve

HOW = (
    "ddp",
    "fsdp",
    "fsdp, prefix left out",
    "fsdp before attach",
    "fsdp of accelerate",
    "fsdp of accelerate, from rank 0",
)
CASES = [(name, how) for name in CONFIGS for how in HOW]


def shard(model: Any, mesh: Any, **how: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, **how)


def shard_as_accelerate(model: Any, mesh: Any, *, from_first: bool) -> None:
    """What `Accelerator.prepare` does for FSDP2, which it takes for granted to be on GPUs.

    `from_first`: the first process alone has the weights, and sends them.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=from_first, reshard_after_forward=True,
    )  # fmt: skip
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), device=torch.device("cpu"), mixed_precision="no",
        torch_device_mesh=mesh, parallelism_config=SimpleNamespace(fsdp_dim_names=["fsdp"]),
        is_main_process=dist.get_rank() == 0,
    )  # fmt: skip
    fsdp2_prepare_model(accelerator, model)


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
    if how.startswith("fsdp of accelerate"):
        shard_as_accelerate(model, mesh, from_first="rank 0" in how)
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


def pushed(handle: Any) -> list[str]:
    """The repositories that this process has put the adapter in, on a Hub of its own."""
    with serve() as hub, only(hub):
        commit = handle.push_to_hub("somebody/prefix", token=TOKEN)
        assert (commit is None) == (not hub.repositories)
        return list(hub.repositories)


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    found: dict[str, Any] = {}
    for name, how in CASES:
        handle, run = prepare(name, how, mesh)
        found[f"{name} {how}"] = train(handle, run, IDS[rank : rank + 1])
        found[f"{name} {how}"]["why no average"] = why_no_average(run)
        trained = set(map(id, handle.parameters()))
        found[f"{name} {how}"]["not frozen"] = [
            name for name, each in run.named_parameters() if each.requires_grad and id(each) not in trained
        ]
        handle.save(f"{folder}/{name} {how}")
        Publisher(handle, Path(folder, f"published {name} {how}")).write(is_writer=rank == 0)
        if (name, how) == ("prefix", "fsdp"):
            found["pushed"] = pushed(handle)
    # Nobody gave a seed, and what FSDP does not know of must still be the same everywhere.
    for kind in (prefixcore.PrefixTuningConfig, prefixcore.PromptTuningConfig):
        model = tiny.model()
        shard(model, mesh)
        torch.manual_seed(rank)
        handle = prefixcore.attach(model, kind(3, init="random"))
        found[kind.__name__] = [parameter.detach().clone() for parameter in handle.parameters()]
    found["refused"] = refused(mesh)
    report(folder, rank, found)
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
