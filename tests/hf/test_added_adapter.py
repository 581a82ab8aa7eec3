"""A LoRA of transformers' own `add_adapter` beside virtual tokens: what is trained, saved, and by what it loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import prefixcore

from .models import make, padded
from .test_beside_peft import lora, moved
from .test_peft_checkpoint import CONFIGS, trainer


def both(config: Any, first: str = "lora", seed: int = 1) -> tuple[Any, Any]:
    """The model and the handle, both adapters trained; `first` is "attach" or "lora"."""
    model = make("llama").train()
    if first == "attach":
        handle = prefixcore.attach(model, config)
        torch.manual_seed(seed)
        model.add_adapter(lora())
    else:
        torch.manual_seed(seed)
        model.add_adapter(lora())
        with pytest.warns(UserWarning, match="train_with_peft"):
            handle = prefixcore.attach(model, config)
    handle.train_with_peft()
    return model, handle


@pytest.mark.parametrize("first", ["attach", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_trained_loads(name: str, first: str, tmp_path: Path) -> None:
    model, handle = both(CONFIGS[name], first)
    assert moved(model, handle) == {"virtual tokens", "peft"}
    model.save_pretrained(tmp_path)
    batch = padded("right")
    expected = model.eval()(**batch).logits
    for order in (0, 1):
        other = make("llama")
        loads = [lambda m=other: m.load_adapter(str(tmp_path)), lambda m=other: prefixcore.load(m, tmp_path)]
        for load in loads[::-1] if order else loads:
            load()
        torch.testing.assert_close(other.eval()(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    with prefixcore.load(make("llama"), tmp_path) as alone:
        assert not torch.allclose(alone.model(**batch).logits, expected, rtol=1e-2, atol=1e-2)


def test_one_that_attach_has_frozen_is_saved_too(tmp_path: Path) -> None:
    """It is part of what the virtual tokens were trained on, and of no base model."""
    model, handle = both(CONFIGS["prefix"])
    handle.train_with_peft(peft=False)
    assert moved(model, handle) == {"virtual tokens"}
    model.save_pretrained(tmp_path / "model")
    make("llama").save_pretrained(tmp_path / "base")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    other.load_adapter(str(tmp_path / "model"))
    prefixcore.load(other, tmp_path / "model")
    batch = padded("right")
    torch.testing.assert_close(other(**batch).logits, model.eval()(**batch).logits, rtol=1e-4, atol=1e-5)


def test_several_active_ones_are_in_the_checkpoint_alone(tmp_path: Path) -> None:
    """transformers writes one; what is trained of all is in `model.safetensors`, as without its files."""
    model, handle = both(CONFIGS["prefix"])
    model.add_adapter(lora(), "second")
    model.set_adapter(["default", "second"])
    handle.train_with_peft()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert (tmp_path / "prefixcore" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_trainer_resumes_both(name: str, tmp_path: Path) -> None:
    """Two and two steps are four steps."""
    whole, _ = both(CONFIGS[name])
    trainer(whole, tmp_path / "whole").train()
    half, _ = both(CONFIGS[name])
    trainer(half, tmp_path / "half", max_steps=2).train()
    resumed, _ = both(CONFIGS[name], seed=2)
    trainer(resumed, tmp_path / "half").train(resume_from_checkpoint=True)
    expected = dict(whole.named_parameters())
    for key, got in resumed.named_parameters():
        if got.requires_grad:
            torch.testing.assert_close(got, expected[key], rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_pefts_own_stays_what_it_is(tmp_path: Path) -> None:
    """A folder with a LoRA alone holds no virtual tokens."""
    peft.get_peft_model(make("llama"), lora()).save_pretrained(tmp_path)
    with pytest.raises(prefixcore.adapters.AdapterError):
        prefixcore.load(make("llama"), tmp_path)
