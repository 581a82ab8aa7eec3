"""Tiny models and adapters of every kind."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from prefixcore.adapters import Manifest, write_adapter
from prefixcore.nn import LayerShape, Prefix, PrefixTuningConfig, PromptTuningConfig, PTuningConfig, SoftPrompt

P = 5
VOCABULARY = 61
MODELS = ("llama", "gpt2")
SHAPES = {"llama": [LayerShape(2, 16, 16)] * 2, "gpt2": [LayerShape(4, 8, 8)] * 2}
UNEVEN = [LayerShape(2, 16, 12), LayerShape(1, 8, 8)]

CONFIGS: dict[str, Any] = {
    "prefix": PrefixTuningConfig(P, init="random", seed=1),
    "prefix-frozen": PrefixTuningConfig(P, init="random", seed=1, num_frozen_tokens=2),
    "prefix-mlp": PrefixTuningConfig(P, init="random", seed=1, prefix_projection=True, encoder_hidden_size=6),
    "prefix-mlp-from-start": PrefixTuningConfig(P, init="vocab", seed=1, reparameterization="mlp"),
    "prefix-low-rank": PrefixTuningConfig(
        P, init="zero", seed=1, reparameterization="low_rank", rank=2, num_frozen_tokens=1
    ),
    "prefix-basis": PrefixTuningConfig(P, init="vocab", seed=1, reparameterization="random_basis", num_basis=10),
    "prompt": PromptTuningConfig(P, init="random", seed=1),
    "prompt-low-rank": PromptTuningConfig(P, init="random", seed=1, reparameterization="low_rank", rank=2),
    "p-tuning-mlp": PTuningConfig(P, init="random", seed=1, encoder_hidden_size=12),
    "p-tuning-lstm": PTuningConfig(P, init="vocab", seed=1, encoder_reparameterization_type="LSTM"),
}


def make_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """Hidden size 32 and two layers; the Llama has grouped heads, the GPT-2 learned positions."""
    torch.manual_seed(seed)
    if name == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
            **changes,
        )
        return GPT2LMHeadModel(config).eval()
    return LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "pad_token_id": 0,
                "bos_token_id": None,
                "eos_token_id": 0,
                **changes,
            }
        )
    ).eval()


def make_module(config: Any, shapes: list[LayerShape], hidden_size: int = 32) -> Prefix | SoftPrompt:
    """The module of a configuration, every parameter moved away from where it started."""
    generator = torch.Generator().manual_seed(5)
    initial: Any = None
    if isinstance(config, PrefixTuningConfig):
        if config.init == "vocab":
            initial = [
                (
                    torch.randn(s.num_kv_heads, P, s.key_dim, generator=generator),
                    torch.randn(s.num_kv_heads, P, s.value_dim, generator=generator),
                )
                for s in shapes
            ]
        module: Prefix | SoftPrompt = Prefix(shapes, config, initial)
    else:
        if config.init == "vocab":
            initial = torch.randn(P, hidden_size, generator=generator)
        module = SoftPrompt(hidden_size, config, initial)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def save(folder: Path, name: str, model: Any, shapes: list[LayerShape], **options: Any) -> Prefix | SoftPrompt:
    """Write the adapter of configuration `name` and return its module."""
    config = CONFIGS[name]
    module = make_module(config, shapes)
    prefix = isinstance(config, PrefixTuningConfig)
    manifest = Manifest.create(model, config, shapes if prefix else None, **options)
    write_adapter(folder, module=module, config=config, manifest=manifest)
    return module


def flat(values: Any) -> list[torch.Tensor]:
    """The tensors of a baked prefix or soft prompt."""
    return [values] if isinstance(values, torch.Tensor) else list(itertools.chain(*values))


def same(one: Any, other: Any) -> bool:
    """Whether two baked prefixes or soft prompts are the same bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(flat(one), flat(other), strict=True))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
