"""Run by torchrun: Accelerate's own `prepare`, for DDP and for FSDP2; each process trains on its row of the batch."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

import prefixcore
from tests import tiny
from tests.distributed.launch import leave, report
from tests.distributed.training import IDS, whole

CONFIGS: dict[str, Any] = {
    "prefix": prefixcore.PrefixTuningConfig(4, seed=0),
    "mlp": prefixcore.PrefixTuningConfig(4, seed=0, reparameterization="mlp"),
    "random basis, one frozen": prefixcore.PrefixTuningConfig(
        4, seed=0, reparameterization="random_basis", num_basis=20, num_frozen_tokens=1
    ),
    "prompt": prefixcore.PromptTuningConfig(4, seed=0),
    "low-rank prompt": prefixcore.PromptTuningConfig(4, seed=0, reparameterization="low_rank", rank=2),
}
HOW = ("ddp", "fsdp", "fsdp, from rank 0")
CASES = [(name, how) for name in CONFIGS for how in HOW]


def make_accelerator(how: str, folder: str) -> Accelerator:
    AcceleratorState._reset_state()
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # which a plugin sets
    if how == "ddp":
        return Accelerator(cpu=True, log_with="tensorboard", project_dir=folder)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading="rank 0" in how, reshard_after_forward=True,
    )  # fmt: skip
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, log_with="tensorboard", project_dir=folder)
    # Accelerate takes FSDP for a thing of GPUs alone; all that follows is its own.
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    return accelerator


def train(accelerator: Accelerator, handle: Any, ids: torch.Tensor, steps: int = 3) -> dict[str, Any]:
    """Losses, the gradients of the first step, what was measured before it, and the values that came of it."""
    handle.model.train()
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.01, eps=1e-3)
    run, optimizer = accelerator.prepare(handle.model, optimizer)
    found: dict[str, Any] = {"losses": [], "gradients": []}
    for step in range(1, steps + 1):
        loss = run(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        found["losses"].append(loss.item())
        measured = prefixcore.measure(handle, {"input_ids": IDS})
        if step == 1:
            found["gradients"] = [whole(parameter.grad) for parameter in handle.parameters()]
            found["measured"] = measured
        accelerator.log({"loss": loss.item(), **measured}, step=step)
        accelerator.clip_grad_norm_(list(handle.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found["values"] = [whole(parameter) for parameter in handle.parameters()]
    return found


def main(folder: str) -> None:
    found: dict[str, Any] = {}
    rank = 0
    for name, how in CASES:
        accelerator = make_accelerator(how, f"{folder}/logs")
        rank = accelerator.process_index
        accelerator.init_trackers(f"{name} {how}")
        handle = prefixcore.attach(tiny.model(), CONFIGS[name])
        found[f"{name} {how}"] = train(accelerator, handle, IDS[rank : rank + 1])
        handle.save(f"{folder}/{name} {how}")
        for tracker in accelerator.trackers:  # as end_training, which would end the group of processes, too
            tracker.finish()
    report(folder, rank, found)
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
