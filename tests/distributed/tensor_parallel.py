"""Run by torchrun: each process has half of the heads of a tiny Llama, and reads the whole batch."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import prefixcore
from prefixcore.hf.bank.bank import Bank
from prefixcore.hf.bank.rows import find_task
from tests.distributed.launch import leave, report
from tests.distributed.training import CONFIGS, IDS, train

SCRATCH = {
    "vocab": prefixcore.PrefixTuningConfig(4, init="vocab"),
    "random": prefixcore.PrefixTuningConfig(4, init="random"),
    "prompt": prefixcore.PromptTuningConfig(4, init="vocab"),
}
"""Without a seed: each process draws values of its own."""


def open_model(base: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, distributed_config=DistributedConfig(tp_size=2))


def main(folder: str, base: str, odd: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found: dict[str, Any] = {}
    for name, config in CONFIGS.items():
        model = open_model(base)
        handle = prefixcore.attach(model, config)
        found[name] = train(handle, model, IDS)
        found[f"{name} numbers"] = handle.num_trainable
        handle.model.eval()
        mask = torch.ones_like(IDS)
        found[f"{name} generated"] = model.generate(IDS, attention_mask=mask, max_new_tokens=5, do_sample=False)
        if rank == 0:  # it is whole in every process
            handle.save(f"{folder}/{name}")
        handle.detach()
        dist.barrier()
        handle = prefixcore.load(model, f"{folder}/{name}")
        found[f"{name} loaded"] = model(IDS, labels=IDS).loss.detach()
        handle.detach()
    model = open_model(base)
    for name, config in SCRATCH.items():
        torch.manual_seed(rank)
        with prefixcore.attach(model, config) as handle:
            found[f"{name} drawn"] = [parameter.detach().clone() for parameter in handle.parameters()]
    found["heads"] = heads_of_a_call(model)
    try:
        prefixcore.attach(open_model(odd), CONFIGS["prefix"])
    except Exception as error:
        found["odd"] = f"{type(error).__name__}: {error}"
    report(folder, rank, found)
    leave()


def heads_of_a_call(model: Any) -> list[int]:
    """How many heads' virtual tokens the layers of this process see."""
    from prefixcore.hf.bank.prefix_calls import prefix_of

    with prefixcore.attach(model, CONFIGS["prefix"]) as handle:
        bank: Bank = handle._bank
        task = find_task(bank, 0)
        assert task is not None
        return [pair[0].shape[0] for pair in prefix_of(bank, task) if pair is not None]


if __name__ == "__main__":
    main(*sys.argv[1:])
