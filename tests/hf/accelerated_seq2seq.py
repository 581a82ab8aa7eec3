"""PEFT models of encoder-decoders with virtual tokens, to be accelerated."""

from __future__ import annotations

from typing import Any

import peft
import torch

from . import encoder_decoders
from .accelerated import METHODS, PREFIXES
from .encoder_decoders import BIASED, TEXT, labels, make

PROMPTS = [method for method in METHODS if method not in PREFIXES and method != "cpt"]
CASES = [
    (family, method)
    for family in TEXT
    for method in (PROMPTS if family in BIASED else [*PREFIXES, *PROMPTS])
    if (family, method) != ("m2m_100", "multitask")  # on which PEFT fails: its model reads the labels as well
]
"""Families and methods that PEFT computes and `accelerate` takes."""


def with_peft(method: str, family: str = "bart", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A model in evaluation mode. The prefix has as many layers as the decoder, and not as the encoder."""
    sizes = {"num_layers": 3} if method in PREFIXES else {}
    torch.manual_seed(3)
    made = peft.get_peft_model(make(family), METHODS[method](**{"task_type": "SEQ_2_SEQ_LM", **sizes, **options}))
    return made.to(dtype).eval()


def inputs(method: str, family: str = "bart", target: bool = True) -> dict[str, Any]:
    """Two rows, the second padded on the right, and what the decoder is to write."""
    batch: dict[str, Any] = encoder_decoders.inputs(family)
    if target:
        batch["labels"] = labels()
    return {**batch, "task_ids": torch.tensor([2, 0])} if method == "multitask" else batch
