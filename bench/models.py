"""Frozen models of real shapes. Random weights are right for time and memory, and never for a claim about learning;
SmolLM2-135M comes with its own where the demo has fetched them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .demo import base_model


@dataclass(frozen=True)
class Shape:
    """What a model looks like. `family` is transformers' `model_type`; `real`: with the weights of SmolLM2-135M."""

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    real: bool = False


TINY = [
    Shape("tiny Llama", "llama", 2, 32, 4, 2, 64, 97),
    Shape("tiny Qwen2", "qwen2", 2, 32, 4, 2, 64, 97),
    Shape("tiny GPT-2", "gpt2", 2, 32, 4, 4, 128, 97),
]
SMALL = [
    Shape("Llama 30M", "llama", 8, 512, 8, 4, 1408, 8192),
    Shape("Qwen2 30M", "qwen2", 8, 512, 8, 2, 1408, 8192),
    Shape("GPT-2 30M", "gpt2", 8, 512, 8, 8, 2048, 8192),
]
SMOLLM2_135M = Shape("SmolLM2-135M's shape", "llama", 30, 576, 9, 3, 1536, 49152)
SMOLLM2_REAL = replace(SMOLLM2_135M, name="SmolLM2-135M", real=True)
LARGE = [
    Shape("SmolLM2-360M's shape", "llama", 32, 960, 15, 5, 2560, 49152),
    Shape("Qwen2-0.5B's shape", "qwen2", 24, 896, 14, 2, 4864, 151936),
    Shape("GPT-2 medium's shape", "gpt2", 24, 1024, 16, 16, 4096, 50257),
]


def missing(shape: Shape) -> str | None:
    """Why there is no such model here, if there is none."""
    if shape.real and not base_model.is_here():
        return "the weights of SmolLM2-135M are not here; `make weights` fetches them"
    return None


def make(shape: Shape, positions: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A frozen model for up to `positions` tokens. Random weights are the same for the same seed. No dropout."""
    model = base_model.load()[0] if shape.real else _random(shape, positions, seed)
    return model.eval().requires_grad_(False).to(dtype)


def _random(shape: Shape, positions: int, seed: int) -> Any:
    import transformers

    torch.manual_seed(seed)
    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if shape.family == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=shape.vocabulary,
            n_embd=shape.hidden,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_inner=shape.inner,
            n_positions=positions,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            **special,
        )
    else:
        config = transformers.AutoConfig.for_model(
            shape.family,
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            **special,
        )
    return transformers.AutoModelForCausalLM.from_config(config)


def twin(model: Any) -> Any:
    """A second model over the very same weights: modules are copied, tensors are not."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def batch(shape: Shape, rows: int, length: int, *, ragged: bool = False) -> dict[str, Tensor]:
    """Rows of `length` tokens, each with a label, and the mask of ones that a collator gives.

    `ragged`: one row is as long, the others' lengths are drawn log-uniformly from a 64th of it upwards, and padding
    stands on the right.
    """
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, shape.vocabulary, (rows, length), generator=g)
    lengths = torch.full((rows,), length)
    if ragged:
        shortest = math.log(max(1, length // 64))
        drawn = shortest + (math.log(length) - shortest) * torch.rand(rows - 1, generator=g)
        lengths[1:] = drawn.exp().long()
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
