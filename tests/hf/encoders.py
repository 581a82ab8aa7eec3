"""Tiny random encoders of every known family, and what a prefix on them has to be: concatenated in their eager code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from .models import VOCABULARY

P = 4
SIDES = ["none", "right", "left"]

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
_DISTIL = {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "initializer_range": 0.2}
_IMAGES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _SIZES),
    "roberta": ("Roberta", {**_SIZES, "pad_token_id": 0}),
    "xlm-roberta": ("XLMRoberta", {**_SIZES, "pad_token_id": 0}),
    "electra": ("Electra", {**_SIZES, "embedding_size": 16}),
    "albert": ("Albert", {**_SIZES, "embedding_size": 16}),
    "distilbert": ("DistilBert", {**_DISTIL, "max_position_embeddings": 64}),
    "modernbert": ("ModernBert", {**_SIZES, **_TOKENS, "local_attention": 4, "global_attn_every_n_layers": 2}),
    "vit": ("ViT", {**_IMAGES, "image_size": 16, "patch_size": 4, "initializer_range": 0.2}),
}
TEXT = [name for name in _CONFIGS if name != "vit"]
MOVING = ["bert", "roberta", "xlm-roberta", "electra"]
"""Those that read a cache, which moves their positions."""


def make(family: str, head: str = "Model", seed: int = 0, **changes: Any) -> Any:
    """A model in evaluation mode with a head, "ForTokenClassification" say; the same seed gives the same weights."""
    name, sizes = _CONFIGS[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**sizes, "num_labels": 3, **changes})
    return getattr(transformers, f"{name}{head}")(config).eval()


def inputs(family: str, side: str = "none") -> dict[str, Tensor]:
    """Three rows of 9, 6 and 2 tokens, padded on one side, or all of 9; or three images."""
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 6, 2)):
        if side == "right":
            mask[row, length:] = 0
        elif side == "left":
            mask[row, : 9 - length] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def moved(family: str, mask: Tensor) -> Tensor:
    """The positions of a text behind P virtual tokens."""
    first = 1 if "roberta" in family else 0
    return (mask.cumsum(1) - 1).clamp(min=0) + first + P


@contextmanager
def concatenated(model: Any, pairs: Sequence[tuple[Tensor, Tensor] | None]) -> Iterator[None]:
    """A block in which the model's own eager attention, of its k-th call, has the k-th of `pairs` before its keys."""
    modeling = sys.modules[type(model).__module__]
    original: Callable[..., Any] = modeling.eager_attention_forward
    left = iter(pairs)

    def eager(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        pair = next(left)
        if pair is None:
            return original(module, query, key, value, mask, **kwargs)
        prefix_key, prefix_value = (x.to(key.dtype).expand(len(key), -1, -1, -1) for x in pair)
        virtual = prefix_key.shape[2]
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = torch.nn.functional.pad(kwargs["position_bias"], (virtual, 0))
        key, value = torch.cat((prefix_key, key), 2), torch.cat((prefix_value, value), 2)
        mask = None if mask is None else torch.nn.functional.pad(mask, (virtual, 0))
        return original(module, query, key, value, mask, **kwargs)

    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    modeling.eager_attention_forward = eager
    try:
        yield
    finally:
        modeling.eager_attention_forward = original
        model.set_attn_implementation(before)


def nine_tenths(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An op that leaves a tenth of the prefix's values out."""

    def wrong(query: Tensor, key: Tensor, value: Tensor, prefix_key: Any, prefix_value: Any, **options: Any) -> Tensor:
        return op(query, key, value, prefix_key, None if prefix_value is None else 0.9 * prefix_value, **options)

    return wrong
