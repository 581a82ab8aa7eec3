"""Without a server for prefixes: transformers and PEFT, requests gathered into batches of one adapter."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from .clients import TOKENS, Answer, Load, Request


def load(model: Any, folders: Sequence[Path]) -> Any:
    """A PEFT model that holds the adapter of each folder, under the folder's name."""
    from peft import PeftModel

    first, *others = folders
    wrapped = PeftModel.from_pretrained(model, first, adapter_name=first.name)
    for folder in others:
        wrapped.load_adapter(folder, adapter_name=folder.name)
    return wrapped.eval()


class FirstToken:
    """A stopping criterion that never stops, and notes when it was first asked: then the first token is there."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self, ids: Any, scores: Any, **others: Any) -> Any:
        self.at = self.at or time.perf_counter()
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


def drive(model: Any, tokenizer: Any, requests: Sequence[Request], clients: int, number: int) -> Load:
    """`clients.drive` on this way of serving.

    All clients wait for the slowest of a gathering of requests, since a batch ends as one; PEFT cannot mix prefixes in
    a batch, so that each adapter of a gathering is a batch of its own.
    """
    asked = list(islice(cycle(requests), number))
    answers: list[Answer] = []
    began = time.perf_counter()
    for start in range(0, number, clients):
        arrived = time.perf_counter()
        groups = defaultdict(list)
        for request in asked[start : start + clients]:
            groups[request.model].append(request.prompt)
        for name, prompts in groups.items():
            model.set_adapter(name)
            answers += _batch(model, tokenizer, prompts, arrived)
    return Load(answers, time.perf_counter() - began)


def _batch(model: Any, tokenizer: Any, prompts: Sequence[str], arrived: float) -> list[Answer]:
    from transformers import StoppingCriteriaList

    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    noted = FirstToken()
    with torch.inference_mode():
        model.generate(
            **batch,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([noted]),  # type: ignore[list-item]
        )
    ended = time.perf_counter()
    return [Answer(noted.at - arrived, ended - arrived)] * len(prompts)
