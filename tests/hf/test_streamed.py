"""Trainer on packed batches of a dataset that is streamed, which accelerate hands out row by row unless told not to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

import prefixcore
from prefixcore import PackedCollator, PrefixTuningConfig, PromptTuningConfig

from .models import make, tokens

ROWS = [{"input_ids": ids, "labels": ids} for ids in (tokens(1, length)[0].tolist() for length in (5, 9, 4, 7))]


class Streamed(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(ROWS)


def trained(config: Any, folder: Path, data: Any, **options: Any) -> list[torch.Tensor]:
    """The virtual tokens after a step on the first two rows."""
    model = make("llama")
    torch.manual_seed(0)
    handle = prefixcore.attach(model, config)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=2, learning_rate=0.5, optim="sgd",
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", **options,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data, data_collator=PackedCollator()).train()
    return [parameter.detach().clone() for parameter in handle.parameters()]


@pytest.mark.parametrize("config", [PrefixTuningConfig(num_virtual_tokens=4), PromptTuningConfig(num_virtual_tokens=4)])
def test_packed_batches_of_a_stream(config: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dispatch_batches"):
        trained(config, tmp_path, Streamed())
    got = trained(config, tmp_path, Streamed(), accelerator_config={"dispatch_batches": False})
    expected = trained(config, tmp_path, ROWS, train_sampling_strategy="sequential")
    torch.testing.assert_close(got, expected)
