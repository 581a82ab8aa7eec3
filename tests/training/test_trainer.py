"""transformers' Trainer: small checkpoints, exact restoring, and what its trackers get to know."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import prefixcore
from prefixcore.audit.virtual import VirtualTokens
from prefixcore.training import AverageCallback
from prefixcore.training.averaging import ETA
from tests import tiny
from tests.audit import eager

CONFIGS = {
    "prefix": prefixcore.PrefixTuningConfig(num_virtual_tokens=4, seed=0),
    "mlp": prefixcore.PrefixTuningConfig(num_virtual_tokens=4, seed=0, reparameterization="mlp"),
    "prompt": prefixcore.PromptTuningConfig(num_virtual_tokens=4, seed=0),
}
TEXTS = torch.randint(2, 90, (8, 7), generator=torch.Generator().manual_seed(0)).tolist()
DATA = [{"input_ids": ids, "labels": ids} for ids in TEXTS]


def make(config: Any, folder: Path, **changes: Any) -> tuple[Any, Any]:
    """A model with virtual tokens, and a Trainer of it."""
    handle = prefixcore.attach(tiny.model(), config)
    options: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.05, "save_steps": 2, "logging_steps": 2,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **{**options, **changes})
    return handle, Trainer(handle.model, arguments, train_dataset=DATA, eval_dataset=DATA[:3])


def values(handle: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in handle.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_training_goes_on_from_a_checkpoint_to_the_bit(config: Any, tmp_path: Path) -> None:
    """Two and two steps are four steps."""
    how = {"lr_scheduler_type": "constant"}  # the others go by the number of steps in all
    whole, trainer = make(config, tmp_path / "whole", **how)
    trainer.train()
    half, trainer = make(config, tmp_path / "half", max_steps=2, **how)
    trainer.train()
    resumed, trainer = make(config, tmp_path / "half", **how)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert not same(values(half), values(whole))
    assert same(values(resumed), values(whole))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_best_checkpoint_is_restored_to_the_bit(config: Any, tmp_path: Path) -> None:
    how = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.5}
    best = {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # the largest: that of an earlier step
    handle, trainer = make(config, tmp_path, max_steps=6, **how, **best)
    trainer.train()
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    step = max(losses, key=lambda each: losses[each])
    assert step < 6, "so that something is restored"
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{step}")
    assert trainer.evaluate()["eval_loss"] == losses[step]
    saved = prefixcore.load(tiny.model(), tmp_path / f"checkpoint-{step}", trainable=True)
    assert same(values(handle), values(saved))


def test_a_checkpoint_holds_the_adapter_and_no_model(tmp_path: Path) -> None:
    _, trainer = make(CONFIGS["prefix"], tmp_path)
    trainer.train()
    folder = tmp_path / "checkpoint-4"
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    numbers = 2 * 2 * 4 * 2 * 16  # layers, key and value, virtual tokens, heads, head dim
    assert numbers * 4 < files["model.safetensors"] < numbers * 4 + 2000
    assert numbers * 4 < files["prefixcore/adapter_model.safetensors"] < numbers * 4 + 2000
    assert files["optimizer.pt"] < 3 * numbers * 4 + 10_000  # AdamW's two moments
    bare = sum(parameter.numel() for parameter in tiny.model().parameters()) * 4
    assert sum(files.values()) < bare / 2


def test_trackers_get_norms_gradients_and_attention(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    handle, trainer = make(CONFIGS["prefix"], tmp_path, report_to=["tensorboard"], save_strategy="no")
    trainer.add_callback(prefixcore.PromptCallback(trainer, probes=3))
    seen: list[list[float]] = []
    step = torch.optim.AdamW.step

    def watching(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append([float(torch.stack([p.grad.norm() for p in layer.parameters()]).norm()) for layer in layers])
        return step(self, *args, **kwargs)

    layers = handle.module.layers
    monkeypatch.setattr(torch.optim.AdamW, "step", watching)
    trainer.train()
    [folder] = (path.parent for path in (tmp_path / "runs").rglob("events*"))
    events = EventAccumulator(str(folder)).Reload()
    logged = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    pairs = handle.bake()
    for layer in (0, 1):
        expected = float(torch.cat([x.reshape(-1) for x in pairs[layer]]).norm())
        assert logged[f"train/prefix_norm/layer_{layer}"][-1] == (4, pytest.approx(expected))
        gradients = [(number, pytest.approx(seen[number - 1][layer])) for number in (2, 4)]
        assert logged[f"train/prefix_grad_norm/layer_{layer}"] == gradients
        assert logged[f"train/prefix_attention/layer_{layer}"][-1] == (4, pytest.approx(mass(pairs, layer), rel=1e-4))
    assert [step for step, _ in logged["train/loss"]] == [2, 4]
    history = [log for log in trainer.state.log_history if "prefix_norm/layer_0" in log]
    assert [log["step"] for log in history] == [2, 4]
    assert "prefix_norm" not in capsys.readouterr().out, "the console has the loss alone"


def mass(pairs: Any, layer: int) -> float:
    """The share of attention on the prefix, by transformers' own eager attention."""
    virtual = VirtualTokens(4, tuple(range(4)), dict(enumerate(pairs)))
    shares = [eager.run(tiny.model(), ids, virtual, range(4))[1][layer][..., :4].sum(-1).mean() for ids in TEXTS[:3]]
    return float(torch.stack(shares).mean())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", {"prefix_norm/layer_0", "prefix_norm/layer_1", "prefix_grad_norm",
                 "prefix_attention/layer_0", "prefix_attention/layer_1"}),
        ("prompt", {"prompt_norm", "prompt_grad_norm"}),
    ],
)  # fmt: skip
def test_what_is_logged_of_other_methods(name: str, expected: set[str], tmp_path: Path) -> None:
    _, trainer = make(CONFIGS[name], tmp_path, save_strategy="no")
    trainer.add_callback(prefixcore.PromptCallback(trainer, every=3))
    trainer.train()
    [log] = [
        log for log in trainer.state.log_history if "epoch" in log and "loss" not in log and "train_loss" not in log
    ]
    assert set(log) - {"step", "epoch"} == expected
    assert log["step"] == 3
    assert all(value > 0 for value in log.values())


def test_measuring_changes_nothing(tmp_path: Path) -> None:
    plain, trainer = make(CONFIGS["prefix"], tmp_path, save_strategy="no")
    trainer.train()
    watched, trainer = make(CONFIGS["prefix"], tmp_path, save_strategy="no")
    trainer.add_callback(prefixcore.PromptCallback(trainer, every=1))
    trainer.train()
    assert same(values(plain), values(watched))


def test_what_the_callback_refuses(tmp_path: Path) -> None:
    _, trainer = make(CONFIGS["prefix"], tmp_path)
    for options, message in (({"every": 0}, "every must be"), ({"probes": -1}, "probes must be")):
        with pytest.raises(ValueError, match=message):
            prefixcore.PromptCallback(trainer, **options)
    trainer.model = tiny.model()
    with pytest.raises(ValueError, match="nothing is attached to LlamaForCausalLM; call prefixcore.attach before"):
        prefixcore.PromptCallback(trainer)


def test_the_state_is_saved_with_what_was_logged(tmp_path: Path) -> None:
    _, trainer = make(CONFIGS["prefix"], tmp_path)
    trainer.add_callback(prefixcore.PromptCallback(trainer))
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert any("prefix_attention/layer_1" in log for log in state["log_history"])


def averaged(config: Any, folder: Path, resume: bool | str = False, **changes: Any) -> tuple[Any, list[list[Tensor]]]:
    """What a training with `AverageCallback` leaves, and its values after each step."""
    handle, trainer = make(config, folder, lr_scheduler_type="constant", **changes)
    steps: list[list[Tensor]] = []

    class Steps(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps.append(values(handle))

    trainer.add_callback(Steps())
    trainer.add_callback(AverageCallback())
    trainer.train(resume_from_checkpoint=resume)
    return handle, steps


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_trainer_leaves_the_average_of_its_steps(config: Any, tmp_path: Path) -> None:
    handle, steps = averaged(config, tmp_path)
    expected = steps[0]
    for t, step in enumerate(steps[1:], start=2):
        expected = [old + (ETA + 1) / (t + ETA) * (new - old) for old, new in zip(expected, step, strict=True)]
    for value, average in zip(values(handle), expected, strict=True):
        torch.testing.assert_close(value, average)
    plain, trainer = make(config, tmp_path / "plain", lr_scheduler_type="constant")
    trainer.train()
    assert same(steps[-1], values(plain))


def test_an_average_goes_on_from_a_checkpoint_to_the_bit(tmp_path: Path) -> None:
    whole, _ = averaged(CONFIGS["prefix"], tmp_path / "whole")
    averaged(CONFIGS["prefix"], tmp_path / "half", max_steps=2)
    resumed, _ = averaged(CONFIGS["prefix"], tmp_path / "half", resume=True)
    assert same(values(resumed), values(whole))
    (tmp_path / "half" / "checkpoint-4" / "average.safetensors").unlink()
    with pytest.warns(UserWarning, match="no average beside the checkpoint"):
        averaged(CONFIGS["prefix"], tmp_path / "half", resume=True, max_steps=6)


def test_an_average_of_another_training_is_not_gone_on_from(tmp_path: Path) -> None:
    """A training that goes on from another folder's checkpoint may find one of the same number in its own."""
    averaged(CONFIGS["prefix"], tmp_path / "first", max_steps=2)
    averaged(CONFIGS["prefix"], tmp_path / "other", max_steps=2, learning_rate=0.5)
    with pytest.warns(UserWarning, match="no average beside the checkpoint .* of other values"):
        handle, _ = averaged(CONFIGS["prefix"], tmp_path / "other", resume=str(tmp_path / "first" / "checkpoint-2"))
    shutil.rmtree(tmp_path / "other")
    with pytest.warns(UserWarning, match="is not there"):
        alone, _ = averaged(CONFIGS["prefix"], tmp_path / "other", resume=str(tmp_path / "first" / "checkpoint-2"))
    assert same(values(handle), values(alone))


def test_a_damaged_average_is_named(tmp_path: Path) -> None:
    averaged(CONFIGS["prefix"], tmp_path, max_steps=2)
    file = tmp_path / "checkpoint-2" / "average.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"average\.safetensors: damaged .* delete it"):
        averaged(CONFIGS["prefix"], tmp_path, resume=True)


def test_an_average_and_the_best_checkpoint_are_two_wishes(tmp_path: Path) -> None:
    _, trainer = make(CONFIGS["prefix"], tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)
    trainer.add_callback(AverageCallback())
    with pytest.raises(ValueError, match="load_best_model_at_end .* choose one"):
        trainer.train()
