"""Ragged data to train on, as a padded batch and as a packed one, and the gate that both pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import models
from bench.demo import base_model, task
from bench.demo.methods import PREFIX
from bench.demo.prompts import INSTRUCTION_WITH_EXAMPLES
from bench.gates import gate
from bench.steps.check import TOLERANCE, gradient, peft_weight, same_start
from prefixcore.training import TokenizedExample, collate, tokenize
from prefixcore.training.data import pack, pad_id

SHORTEST = 16


@dataclass(frozen=True)
class Data:
    """One batch of examples. Labels are on the completions alone."""

    examples: list[TokenizedExample]
    virtual: int
    pad_token_id: int = 0

    def padded(self) -> dict[str, Tensor]:
        return collate(self.examples, self.pad_token_id)

    def packed(self) -> dict[str, Any]:
        """What `PackedCollator` makes of them."""
        return pack(self.examples)

    def case(self, model: str, data: str, kind: str) -> dict[str, Any]:
        lengths = [example.length for example in self.examples]
        labels = sum(len(example.completion_ids) for example in self.examples)
        sizes = {"B": len(lengths), "T": max(lengths), "P": self.virtual, "tokens": sum(lengths), "labels": labels}
        return {"model": model, "data": data, "kind": kind, **sizes}


def ragged(vocabulary: int, rows: int, longest: int, virtual: int, shortest: int = SHORTEST) -> Data:
    """Lengths drawn log-uniformly from `shortest` to `longest`; the last fifth of each is the answer."""
    g = torch.Generator().manual_seed(0)
    low, high = math.log(shortest), math.log(longest)
    lengths = (low + (high - low) * torch.rand(rows, generator=g)).exp().round().long().tolist()
    examples = []
    for length in lengths:
        ids = torch.randint(3, vocabulary, (length,), generator=g).tolist()
        asked = length - max(1, length // 5)
        examples.append(TokenizedExample(ids[:asked], ids[asked:]))
    return Data(examples, virtual)


def countries(tokenizer: Any) -> Data:
    """As many of the demo's examples as it trains on at once, and as many virtual tokens as its prefix has."""
    examples = task.make(task.countries()).training
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    tokenized = tokenize(tokenizer, [examples[i] for i in order[: PREFIX.batch_size]], end=task.END)
    return Data(tokenized, len(tokenizer(INSTRUCTION_WITH_EXAMPLES)["input_ids"]), pad_id(tokenizer))


def demo_data() -> Data:
    from transformers import AutoTokenizer

    return countries(AutoTokenizer.from_pretrained(base_model.converted_model()))


def check(model: Any, data: Data, kind: str) -> float:
    """The gate: from one start, our prefix or prompt on the packed batch and on the padded one gives the loss and the
    gradient of PEFT's on the padded one. Returns the greatest relative error."""
    twin = models.twin(model)
    theirs, handle = same_start(model, twin, data.padded(), data.virtual, kind)
    loss = theirs(use_cache=False, **data.padded()).loss
    loss.backward()
    want = {"loss": loss, "gradient": peft_weight(theirs).grad}
    worst = 0.0
    for name, batch in (("packed", data.packed()), ("padded", data.padded())):
        handle.module.zero_grad()
        loss = twin(use_cache=False, **batch).loss
        loss.backward()
        got = {"loss": loss, "gradient": gradient(handle)}
        worst = max(worst, gate(f"a {name} batch with our {kind}", got, want, TOLERANCE))
    return worst
