"""PEFT's ways of training a frozen model: prefix, prompt and Cartridge tuning, and LoRA."""

from __future__ import annotations

from typing import Any

import peft
import torch

CAUSAL = "CAUSAL_LM"


def prefix_tuning(model: Any, num_virtual_tokens: int) -> Any:
    """Keys and values of every layer, PEFT's default start."""
    return _wrap(model, peft.PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=num_virtual_tokens))


def prompt_tuning(model: Any, num_virtual_tokens: int) -> Any:
    """Embeddings before the text, PEFT's default start."""
    return _wrap(model, peft.PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=num_virtual_tokens))


def cartridge(model: Any, num_virtual_tokens: int) -> Any:
    """A prefix whose first token stays as it is (PEFT's default)."""
    return _wrap(model, peft.CartridgeConfig(task_type=CAUSAL, num_virtual_tokens=num_virtual_tokens))


def lora(model: Any, rank: int, *, everywhere: bool) -> Any:
    """LoRA on the matrices that PEFT picks for the family (query and value), or on every linear layer."""
    targets = "all-linear" if everywhere else None
    config = peft.LoraConfig(task_type=CAUSAL, r=rank, lora_dropout=0.0, target_modules=targets)
    if model.config.model_type == "gpt2":
        config.fan_in_fan_out = True  # GPT-2 stores its matrices transposed; PEFT would warn and set this itself
    return _wrap(model, config)


def _wrap(model: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(model, config)
