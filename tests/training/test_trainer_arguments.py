"""Arguments of transformers' Trainer with virtual tokens: each as with any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import prefixcore
from tests import tiny

CONFIGS = {
    "prefix": prefixcore.PrefixTuningConfig(num_virtual_tokens=4, seed=0),
    "prompt": prefixcore.PromptTuningConfig(num_virtual_tokens=4, seed=0),
    "p-tuning": prefixcore.PTuningConfig(num_virtual_tokens=4, seed=0),
}
TEXTS = torch.randint(2, 90, (4, 7), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": ids, "labels": ids} for ids in TEXTS.tolist()]


def make(name: str, folder: Path, trainer: dict[str, Any] | None = None, **changes: Any) -> tuple[Any, Any]:
    """A model with virtual tokens, and a Trainer of it that takes one step."""
    handle = prefixcore.attach(tiny.model(), CONFIGS[name])
    options: dict[str, Any] = {
        "max_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "use_cpu": True, "optim": "sgd", "learning_rate": 1.0,
        "max_grad_norm": 0,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **{**options, **changes})
    return handle, Trainer(handle.model, arguments, train_dataset=DATA, eval_dataset=DATA, **(trainer or {}))


@pytest.mark.parametrize("how", [{}, {"data_collator": prefixcore.PackedCollator()}], ids=["padded", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_means_over_the_labels_that_trainer_counts(name: str, how: Any, tmp_path: Path) -> None:
    """Those from the second token of each row on, also where a soft prompt would predict the first."""
    handle, trainer = make(name, tmp_path, how)
    with torch.no_grad():
        logits = handle.model(TEXTS).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TEXTS[:, 1:].flatten()).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    for size, steps in ((1, 4), (2, 2)):
        parts, trainer = make(name, tmp_path, how, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
        for one, other in zip(parts.parameters(), handle.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [{}, {"data_collator": prefixcore.PackedCollator()}], ids=["padded", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_smoothed_labels_are_those_of_the_logits(name: str, how: Any, tmp_path: Path) -> None:
    handle, trainer = make(name, tmp_path, how, label_smoothing_factor=0.3)
    with torch.no_grad():
        logits = handle.model(TEXTS).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, TEXTS[:, 1:].flatten(), label_smoothing=0.3).item()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_noise_is_on_the_text_alone_and_gone_after_training(name: str, tmp_path: Path) -> None:
    handle, trainer = make(name, tmp_path, neftune_noise_alpha=50.0)
    seen: list[torch.Tensor] = []
    hook = handle.model.model.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach()))
    virtual = 0 if name == "prefix" else 4
    with torch.no_grad():
        handle.model(TEXTS)
    [bare] = seen
    with torch.no_grad():
        start = trainer.evaluate()["eval_loss"]
    seen.clear()
    trainer.train()
    moved = (seen[0].sort(0)[0] - bare.sort(0)[0]).abs().amax((0, 2))
    assert (moved[virtual:] > 0.1).all()
    assert (moved[:virtual] == 0).all()
    hook.remove()
    handle.model.train()
    with torch.no_grad():
        loss = handle.model(TEXTS, labels=TEXTS).loss
        torch.testing.assert_close(handle.model(TEXTS, labels=TEXTS).loss, loss, rtol=0, atol=0)
    assert trainer.evaluate()["eval_loss"] != start, "trained"
