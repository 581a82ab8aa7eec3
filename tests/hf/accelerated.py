"""PEFT models of every method with virtual tokens, to be accelerated, and what is compared."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

import prefixcore
import prefixcore.hf.attention.interface
import prefixcore.hf.peft.soft_prompt

from .models import make, padded

P = 5


def cpt(**options: Any) -> Any:
    types = [1, 2, 2, 3, 4]
    return peft.CPTConfig(cpt_token_ids=[3, 4, 5, 6, 7], cpt_mask=[1] * P, cpt_tokens_type_mask=types, **options)


METHODS: dict[str, Callable[..., Any]] = {
    "prefix": lambda **options: peft.PrefixTuningConfig(num_virtual_tokens=P, **options),
    "projected prefix": lambda **options: peft.PrefixTuningConfig(
        num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=8, **options
    ),
    "cartridge": lambda **options: peft.CartridgeConfig(num_virtual_tokens=P, num_frozen_tokens=2, **options),
    "prompt": lambda **options: peft.PromptTuningConfig(num_virtual_tokens=P, **options),
    "p-tuning": lambda **options: peft.PromptEncoderConfig(num_virtual_tokens=P, encoder_hidden_size=8, **options),
    "p-tuning lstm": lambda **options: peft.PromptEncoderConfig(
        num_virtual_tokens=P, encoder_hidden_size=8, encoder_reparameterization_type="LSTM", **options
    ),
    "multitask": lambda **options: peft.MultitaskPromptTuningConfig(num_virtual_tokens=P, num_tasks=3, **options),
    "cpt": cpt,
}


PREFIXES = ["prefix", "projected prefix", "cartridge"]


def with_peft(method: str, family: str = "llama", **options: Any) -> Any:
    torch.manual_seed(3)
    peft_model = peft.get_peft_model(make(family), METHODS[method](task_type="CAUSAL_LM", **options))
    if method == "cpt":  # zero at the start, which would hide it
        torch.nn.init.normal_(peft_model.prompt_encoder["default"].delta_embedding.weight)
    return peft_model


def inputs(method: str, side: str = "right", labels: bool = True) -> dict[str, Any]:
    batch: dict[str, Any] = padded(side)
    if not labels:
        del batch["labels"]
    return {**batch, "task_ids": torch.tensor([2, 0, 1])} if method == "multitask" else batch


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def step(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    out = model(**batch)
    out.loss.backward()
    return out.logits.detach(), out.loss.detach(), gradients(model)


def assert_close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def count_ops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of our ops, once for each call from then on."""
    calls: list[str] = []

    def counted(name: str, op: Any) -> Any:
        return lambda *arguments, **options: calls.append(name) or op(*arguments, **options)

    for module, name in (
        (prefixcore.hf.attention.interface, "prefix_attention"),
        (prefixcore.hf.peft.soft_prompt, "soft_embedding"),
    ):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return calls


def _of_length(method: str, num_virtual_tokens: int = P) -> Any:
    config = METHODS[method](task_type="CAUSAL_LM")
    config.num_virtual_tokens = num_virtual_tokens
    return config


def pickled(model: Any) -> Any:
    """The model, pickled and read again."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def evaluations(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one each time that the virtual tokens are made anew."""
    encoder, made = model.prompt_encoder["default"], []
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda indices: made.append(None) or forward(indices))
    return made
