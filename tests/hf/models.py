"""Tiny random models of every known family, a tokenizer, and what a model is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from prefixcore.hf import FAMILIES as KNOWN
from prefixcore.hf.families import NO_LAYERS

VOCABULARY = 97

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # far from uniform predictions, so that a wrong detail shows
}


def _llama(**changes: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_DECODER, **changes}))


def _some_windows(changes: dict[str, Any]) -> dict[str, Any]:
    """A Qwen has windows where it is told to use them, from some layer on."""
    return {"use_sliding_window": True, "max_window_layers": 1} if "sliding_window" in changes else {}


def _qwen2(**changes: Any) -> Any:
    options = {**_DECODER, **_some_windows(changes), **changes}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**options))


def _qwen3(**changes: Any) -> Any:
    options = {**_DECODER, **_some_windows(changes), **changes}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**options))
    for layer in model.model.layers:  # a norm of ones would hide where it is applied
        torch.nn.init.uniform_(layer.self_attn.k_norm.weight, 0.5, 2.0)
    return model


def _mistral(**changes: Any) -> Any:
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(**{**_DECODER, "sliding_window": None, **changes})
    )


def _gemma2(**changes: Any) -> Any:
    options = {**_DECODER, "sliding_window": 64, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 4}
    options["attn_implementation"] = "eager"  # transformers' SDPA knows no softcap
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**{**options, **changes}))


def _gpt_oss(**changes: Any) -> Any:
    options = {
        **_DECODER,
        "sliding_window": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**{**options, **changes}))


def _gpt2(**changes: Any) -> Any:
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "initializer_range": 0.2,
    }
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**options, **changes}))


_MAKERS: dict[str, Callable[..., Any]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gpt2": _gpt2,
    "gemma2": _gemma2,
    "gpt_oss": _gpt_oss,
}

FAMILIES = list(_MAKERS)
WINDOWED = [name for name, family in KNOWN.items() if family.sliding_window != NO_LAYERS]
PEFT_PREFIX = [name for name, family in KNOWN.items() if "prefix" in family.peft_methods]
PEFT_PROMPT = [name for name, family in KNOWN.items() if "prompt" in family.peft_methods]


def make(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model in evaluation mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return _MAKERS[family](**changes).eval()


def window_of(family: str, size: int) -> dict[str, int]:
    """What to change for sliding windows of `size`; nothing where the family has none."""
    return {"sliding_window": size} if family in WINDOWED else {}


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    """[rows, length] ids without the special ones."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(side: str) -> dict[str, Tensor]:
    """A batch of three rows of 9, 6 and 2 tokens: `side` is "none" (all of 9), "right" or "left"."""
    ids = tokens(3, 9)
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 6, 2)):
        if side == "right":
            mask[row, length:] = 0
        elif side == "left":
            mask[row, : 9 - length] = 0
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Tokenizer:
    """One token a character."""

    name_or_path = "tests/one-token-a-character"

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(character) % (VOCABULARY - 3) for character in text]}

    def __len__(self) -> int:
        return VOCABULARY


def state(model: Any) -> dict[str, Any]:
    """Everything that attaching changes, or might: to compare before and after."""
    modules = dict(model.named_modules())
    return {
        "state_dict": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "identity": {name: id(p) for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in modules.items()},
        "attributes": {name: sorted(module.__dict__) for name, module in modules.items()},
        "hooks": {
            name: [
                (kind, list(getattr(module, kind)))
                for kind in sorted(module.__dict__)
                if kind.endswith("hooks") or "hooks_" in kind
            ]
            for name, module in modules.items()
        },
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
        "rng": torch.get_rng_state(),
    }


def assert_same(before: Any, after: Any, where: str = "") -> None:
    """Equality through dictionaries, lists and tensors (bit by bit), naming the place that differs."""
    if isinstance(before, dict):
        assert list(before) == list(after), where
        for key in before:
            assert_same(before[key], after[key], f"{where}/{key}")
    elif isinstance(before, Tensor):
        assert torch.equal(before, after), where
    else:
        assert before == after, where


def after(text: str, ids: Tensor) -> Tensor:
    """The rows of `ids`, each with the tokens of `text` before it."""
    return torch.cat((torch.tensor([Tokenizer()(text)["input_ids"]]).expand(ids.shape[0], -1), ids), 1)


def close(got: Any, expected: Any) -> None:
    """Asserts that two tensors differ by no more than float32's rounding in a small model."""
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
