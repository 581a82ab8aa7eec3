"""Run by torchrun, or by one process: transformers' Trainer, up to a number of steps."""

from __future__ import annotations

import os
import sys

import torch
from transformers import Trainer, TrainingArguments

import prefixcore
from tests import tiny
from tests.distributed.launch import leave, report
from tests.distributed.training import CONFIGS, whole

TEXTS = torch.randint(2, 90, (12, 7), generator=torch.Generator().manual_seed(0)).tolist()
DATA = [{"input_ids": ids, "labels": ids} for ids in TEXTS]


def main(folder: str, runs: str, steps: str, resume: str) -> None:
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    arguments = TrainingArguments(
        runs, max_steps=int(steps), per_device_train_batch_size=2 // processes, learning_rate=0.01, adam_epsilon=1e-3,
        lr_scheduler_type="constant", save_steps=2, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        seed=3,
    )  # fmt: skip
    handle = prefixcore.attach(tiny.model(), CONFIGS["prefix"])
    trainer = Trainer(handle.model, arguments, train_dataset=DATA)
    trainer.train(resume_from_checkpoint=resume == "resume")
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    found = {"losses": losses, "values": [whole(parameter) for parameter in handle.parameters()]}
    if trainer.is_world_process_zero():
        handle.save(f"{runs}/saved")
    report(folder, rank, found)
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
