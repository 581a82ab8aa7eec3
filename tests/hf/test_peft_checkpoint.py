"""A Trainer with a PeftModel (LoRA) around an attached model saves the virtual tokens too, and resumes with both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

import prefixcore

from .models import make, padded, tokens

CONFIGS = {
    "prefix": prefixcore.PrefixTuningConfig(4, seed=0),
    "mlp": prefixcore.PrefixTuningConfig(4, seed=0, reparameterization="mlp"),
    "prompt": prefixcore.PromptTuningConfig(4, seed=0),
}


def both(config: Any) -> tuple[Any, list[Any]]:
    """A PeftModel around a model with virtual tokens, both of which train; and what is trained."""
    model = make("llama")
    handle = prefixcore.attach(model, config)
    torch.manual_seed(1)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    peft_model = peft.get_peft_model(model, lora)
    handle.train_with_peft()
    return peft_model, [p for p in peft_model.parameters() if p.requires_grad]


def trainer(model: Any, folder: Path, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.05, "save_strategy": "steps",
        "save_steps": 2, "lr_scheduler_type": "constant", "report_to": [], "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    ids = tokens(8, 8)
    data = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids]
    arguments = TrainingArguments(output_dir=str(folder), **{**options, **changes})
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_trainer_resumes_both(name: str, tmp_path: Path) -> None:
    """Two and two steps are four steps."""
    whole, expected = both(CONFIGS[name])
    trainer(whole, tmp_path / "whole").train()
    half, _ = both(CONFIGS[name])
    trainer(half, tmp_path / "half", max_steps=2).train()
    resumed, got = both(CONFIGS[name])
    trainer(resumed, tmp_path / "half").train(resume_from_checkpoint=True)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_checkpoint_is_loaded_without_trainer(tmp_path: Path) -> None:
    model, _ = both(CONFIGS["mlp"])
    trainer(model, tmp_path, max_steps=2).train()
    batch = padded("right")
    expected = model.eval()(**batch).logits
    folder = tmp_path / "checkpoint-2"
    again = make("llama")
    prefixcore.load(again, folder)
    again = peft.PeftModel.from_pretrained(again, folder).eval()
    torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert set(again.peft_config) == {"default"}


def test_a_bank_and_the_best_checkpoint(tmp_path: Path) -> None:
    model = make("llama")
    bank = prefixcore.PromptBank(model)
    handles = [bank.attach(name, CONFIGS[name]) for name in ("prefix", "prompt")]
    peft_model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    for handle in handles:
        handle.train_with_peft()
    peft_model.save_pretrained(tmp_path)
    before = [p.detach().clone() for handle in handles for p in handle.parameters()]
    with torch.no_grad():
        for handle in handles:
            for p in handle.parameters():
                p.add_(1.0)
    peft_model.load_adapter(tmp_path, "default")  # as Trainer's load_best_model_at_end does
    after = [p for handle in handles for p in handle.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    model, _ = both(CONFIGS["prefix"])
    model.save_pretrained(tmp_path / "prefix")
    other, _ = both(CONFIGS["prompt"])
    with pytest.raises(prefixcore.adapters.AdapterError, match="prefix, 4 of them.*prompt, 4"):
        other.load_adapter(tmp_path / "prefix", "default", is_trainable=True)
    lora = peft.get_peft_model(make("llama"), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    assert not (tmp_path / "lora" / "prefixcore").exists()
    with pytest.warns(UserWarning, match="no virtual tokens"):
        model.load_adapter(tmp_path / "lora", "default", is_trainable=True)


def test_virtual_tokens_that_were_loaded_keep_their_values(tmp_path: Path) -> None:
    model, _ = both(CONFIGS["prompt"])
    model.save_pretrained(tmp_path)
    base = make("llama")
    handle = prefixcore.attach(base, prefixcore.PromptTuningConfig(4, seed=9))
    before = handle.bake()
    peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(handle.bake(), before)
