"""Run by torchrun: DeepSpeed's ZeRO-3, which has every parameter in pieces, on a CPU."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
import pytest

import prefixcore
from prefixcore.adapters import AdapterError, compare_fingerprints, fingerprint
from tests import tiny
from tests.distributed.launch import leave, report
from tests.distributed.training import CONFIGS, IDS, why_no_average

THRESHOLDS = {"small ones whole": {}, "all in pieces": {"stage3_param_persistence_threshold": 0}}


def main(folder: str) -> None:
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    found: dict[str, Any] = {"why no average": []}
    for name in CONFIGS:
        for how, threshold in THRESHOLDS.items():
            handle = prefixcore.attach(tiny.model(), CONFIGS[name])
            optimizer = {"type": "AdamW", "params": {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.01, "torch_adam": True}}
            config = {
                "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **threshold},
                "optimizer": optimizer, "zero_force_ds_cpu_optimizer": False, "gradient_clipping": 1.0,
            }  # fmt: skip
            engine, *_ = deepspeed.initialize(
                model=handle.model, model_parameters=list(handle.parameters()), config=config
            )
            ids, losses = IDS[rank : rank + 1], []
            for _ in range(3):
                loss = engine(input_ids=ids, labels=ids).loss
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
            found["why no average"].append(why_no_average(engine))
            here = fingerprint(engine.module)
            compare_fingerprints(fingerprint(tiny.model()), here)
            with pytest.raises(AdapterError, match="other weights"):
                compare_fingerprints(fingerprint(tiny.model(seed=1)), here)
            handle.save(f"{folder}/{name}, {how}")
            found[f"{name}, {how}"] = losses
    report(folder, rank, found)
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
