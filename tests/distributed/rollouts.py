"""Run by torchrun: TRL's GRPOTrainer, whose processes share a group of answers of one server."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch.distributed as dist

import prefixcore
import prefixcore.adapters.manifest
from tests.distributed.launch import leave, report
from tests.serving.fake_openai import serving
from tests.serving.sampling_server import SamplingServer
from tests.serving.test_rollouts import CONFIGS, make_trainer


def main(folder: str) -> None:
    rank, adapters = int(os.environ["RANK"]), Path(folder, "adapters")
    # As where a second has passed between two writers: what each would write has another digest.
    prefixcore.adapters.manifest.now = lambda: f"2026-01-01T00:00:0{rank}Z"
    options = {"per_device_train_batch_size": 2, "generation_kwargs": {"seed": 7}}
    trainer = make_trainer(Path(folder, f"{rank}"), CONFIGS["prompt"], **options)
    adapters.mkdir(exist_ok=True)
    server = SamplingServer(adapters)
    with serving(server) if rank == 0 else nullcontext() as url:
        addresses = [url]
        dist.broadcast_object_list(addresses)
        prefixcore.ServedRollouts(trainer, str(addresses[0]), adapters)
        trainer.train()
        dist.barrier()
    found = [log["sampling/sampling_logp_difference/max"] for log in trainer.state.log_history[:-1]]
    sampled = [body for body in server.requests if "repetition_penalty" in body]
    report(folder, rank, {"differences": found, "asked": [(body["n"], body["seed"]) for body in sampled]})
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
