"""`measure`, and what comes of it in the trackers that Lightning, DPOTrainer and Accelerate write to."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import prefixcore
from tests import tiny

IDS = torch.randint(2, 90, (2, 7), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}
NAMES = {f"{what}/layer_{i}" for what in ("prefix_norm", "prefix_grad_norm", "prefix_attention") for i in (0, 1)}
PREFIX = prefixcore.PrefixTuningConfig(num_virtual_tokens=4, seed=0)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """By name, the steps and values in the one file of events below a folder."""
    [path] = folder.rglob("events*")
    events = EventAccumulator(str(path)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def by_hand(steps: int) -> list[dict[str, float]]:
    """What a bare loop measures before each of its steps."""
    handle = prefixcore.attach(tiny.model(), PREFIX)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.01)
    found = []
    for _ in range(steps):
        handle.model.train()
        loss = handle.model(**BATCH).loss
        loss.backward()
        found.append({"loss": loss.item(), **prefixcore.measure(handle, BATCH)})
        optimizer.step()
        optimizer.zero_grad()
    return found


EMBEDDINGS = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("config", "more"),
    [
        (prefixcore.PromptTuningConfig(init=EMBEDDINGS), {}),
        (prefixcore.PromptTuningConfig(init=EMBEDDINGS, reparameterization="low_rank", rank=2), {}),
        (prefixcore.PTuningConfig(init=EMBEDDINGS, encoder_hidden_size=8), {}),
        (prefixcore.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=2, num_ranks=1), {"task_ids": [0, 1]}),
        (
            prefixcore.CPTConfig(cpt_token_ids=[3, 4, 5], cpt_mask=[1] * 3, cpt_tokens_type_mask=[1, 2, 4]),
            {"input_type_mask": torch.full_like(IDS, 4)},
        ),
    ],
    ids=["plain", "low rank", "p-tuning", "multitask", "cpt"],
)
def test_the_norm_of_a_soft_prompt_is_of_what_the_model_reads(config: Any, more: Any, tmp_path: Path) -> None:
    """And not of the parameters that it is made of, of which a prompt that is loaded to be used trains none."""
    handle = prefixcore.attach(tiny.model(), config)
    expected = pytest.approx(float(handle.bake().norm()), rel=1e-5)
    assert prefixcore.measure(handle) == {"prompt_norm": expected}
    handle.model(**BATCH, **more).loss.backward()
    assert set(prefixcore.measure(handle)) == {"prompt_norm", "prompt_grad_norm"}
    handle.save(tmp_path / "adapter")
    loaded = prefixcore.load(tiny.model(), tmp_path / "adapter")
    assert prefixcore.measure(loaded) == {"prompt_norm": expected}


def test_measure_asks_for_the_handle() -> None:
    with pytest.raises(TypeError, match="expected the handle that attach or load gave, got a LlamaForCausalLM"):
        prefixcore.measure(tiny.model())  # type: ignore[arg-type]


def test_measure_is_norms_gradients_and_attention() -> None:
    handle = prefixcore.attach(tiny.model(), PREFIX)
    before = prefixcore.measure(handle)
    assert set(before) == {"prefix_norm/layer_0", "prefix_norm/layer_1"}, (
        "nothing has a gradient, and no batch is given"
    )
    handle.model.train()
    handle.model(**BATCH).loss.backward()
    found = prefixcore.measure(handle, [BATCH, BATCH])
    assert set(found) == NAMES
    assert handle.model.training
    assert found == pytest.approx(prefixcore.measure(handle, BATCH), rel=1e-5)
    for i, layer in enumerate(handle.module.layers):
        both = torch.cat((layer.key.detach().flatten(), layer.value.detach().flatten()))
        assert found[f"prefix_norm/layer_{i}"] == pytest.approx(float(both.norm()), rel=1e-5)
        gradient = torch.cat((layer.key.grad.flatten(), layer.value.grad.flatten()))
        assert found[f"prefix_grad_norm/layer_{i}"] == pytest.approx(float(gradient.norm()), rel=1e-5)
        assert 0 < found[f"prefix_attention/layer_{i}"] < 1


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and on logging
@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_lightning(logger: str, tmp_path: Path) -> None:
    import lightning
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    handle = prefixcore.attach(tiny.model(), PREFIX)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = handle.model

        def training_step(self, batch: Any, index: int) -> Any:
            self.batch = batch
            loss = self.model(**batch).loss
            self.log("loss", loss)
            return loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.log_dict(prefixcore.measure(handle, self.batch))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(handle.parameters(), lr=0.01)

    handle.model.train()
    trainer = lightning.Trainer(
        max_steps=3, logger=(CSVLogger if logger == "csv" else TensorBoardLogger)(tmp_path), log_every_n_steps=1,
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader([BATCH] * 3, batch_size=None))
    if logger == "csv":
        [path] = tmp_path.rglob("metrics.csv")
        with path.open() as file:
            rows = list(csv.DictReader(file))
        found = {name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in {*NAMES, "loss"}}
    else:
        found = scalars(tmp_path)
    for name in {*NAMES, "loss"}:
        assert found[name] == [(step, pytest.approx(each[name], rel=1e-5)) for step, each in enumerate(by_hand(3))], (
            name
        )


def test_accelerate(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    handle = prefixcore.attach(tiny.model(), PREFIX)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.01)
    model, optimizer = accelerator.prepare(handle.model, optimizer)
    for step in range(3):
        model.train()
        loss = model(**BATCH).loss
        accelerator.backward(loss)
        accelerator.log({"loss": loss.item(), **prefixcore.measure(handle, BATCH)}, step=step)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.end_training()
    found = scalars(tmp_path)
    for name in {*NAMES, "loss"}:
        assert found[name] == [(step, pytest.approx(each[name], rel=1e-5)) for step, each in enumerate(by_hand(3))], (
            name
        )


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL needs Python 3.11")
@pytest.mark.parametrize("tracker", ["tensorboard", "none"])
def test_dpo_trainer_by_the_callback(tracker: str, tmp_path: Path, monkeypatch: Any) -> None:
    from trl import DPOConfig, DPOTrainer

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    handle = prefixcore.attach(tiny.model(), PREFIX)
    rows = [{"prompt": "ab ->", "chosen": f" {'c' * n}", "rejected": " dd"} for n in range(1, 5)]
    arguments = DPOConfig(
        str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=2, learning_rate=0.01, logging_steps=2,
        precompute_ref_log_probs=True, gradient_checkpointing=False, bf16=False, report_to=tracker, use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    with handle.disabled():
        trainer = DPOTrainer(
            handle.model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tiny.tokenizer()
        )
    trainer.add_callback(prefixcore.PromptCallback(trainer, probes=3))
    trainer.train()
    history = {log["step"]: log for log in trainer.state.log_history if "prefix_norm/layer_0" in log}
    assert sorted(history) == [2, 4]
    assert set(history[2]) >= NAMES
    # The attention is that on texts with the chosen and with the rejected answer.
    probes = [trainer.data_collator([trainer.train_dataset[i]]) for i in range(3)]
    assert all(probe["input_ids"].shape[0] == 2 for probe in probes)
    inputs = [{name: probe[name] for name in ("input_ids", "attention_mask")} for probe in probes]
    now = prefixcore.measure(handle, inputs)
    for name in now:
        assert history[4][name] == pytest.approx(now[name], rel=1e-5), name
    if tracker == "tensorboard":
        found = scalars(tmp_path / "events")
        assert [step for step, _ in found["train/loss"]] == [2, 4]
        for name in NAMES:
            assert found[f"train/{name}"] == [(step, pytest.approx(history[step][name], rel=1e-5)) for step in (2, 4)]
