"""What a server's answers are held to: the same model in transformers, with the same adapters on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..training.data import encode

TOLERANCES = {torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 2.5e-1}
"""How far a log-probability may be from the reference's, in nats, by the dtype of the weights. What rounding makes is
several times smaller; what another prefix makes is mostly above 1."""


@dataclass(frozen=True)
class Step:
    """What the reference thinks of one token of an answer.

    Attributes:
        logprob: of that token.
        best: the highest of any token.
    """

    logprob: float
    best: float


class Reference:
    """A model in transformers with every adapter of a registry.

    Args:
        model: a causal language model; it is changed in place.
        tokenizer: its own.
        adapters: the adapters' folders, by name.

    Raises:
        AdapterError: one of them is not for this model, or damaged.
    """

    def __init__(self, model: Any, tokenizer: Any, adapters: Mapping[str, Path]) -> None:
        from ..hf import PromptBank

        self.model, self.tokenizer = model, tokenizer
        self.names = list(adapters)
        bank = PromptBank(model)
        for name, folder in adapters.items():
            bank.load(_task(name), folder)

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return next(self.model.parameters()).dtype

    def ids(self, prompt: str) -> list[int]:
        """The tokens of a prompt, as a server makes them."""
        return encode(self.tokenizer, prompt, "prompt")

    def chat_ids(self, text: str) -> list[int] | None:
        """The tokens of a chat in which a user has said a text; None: the tokenizer has no template for it."""
        if not getattr(self.tokenizer, "chat_template", None):
            return None
        made = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return [int(i) for i in made["input_ids"]]

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, as a server writes it."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @torch.no_grad()
    def score(self, name: str | None, prompt: Sequence[int], answer: Sequence[int]) -> list[Step]:
        """What the model with an adapter, or the bare one, thinks of each token of an answer."""
        ids = torch.tensor([[*prompt, *answer]], device=self.model.device)
        tasks = None if name is None else _task(name)
        logits = self.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), task_ids=[tasks], use_cache=False
        ).logits
        scores = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        return [Step(float(row[token]), float(row.max())) for row, token in zip(scores, answer, strict=True)]

    @torch.no_grad()
    def continuation(self, name: str | None, prompt: Sequence[int], tokens: int) -> tuple[list[int], list[float]]:
        """The likeliest tokens after a prompt, up to an end, and their log-probabilities."""
        ends = self.ends
        ids: list[int] = list(prompt)
        logprobs: list[float] = []
        tasks = None if name is None else _task(name)
        for _ in range(tokens):
            batch = torch.tensor([ids], device=self.model.device)
            mask = torch.ones_like(batch)
            logits = self.model(input_ids=batch, attention_mask=mask, task_ids=[tasks], use_cache=False).logits
            row = logits[0, -1].float().log_softmax(-1)
            token = int(row.argmax())
            if token in ends:
                break
            ids.append(token)
            logprobs.append(float(row[token]))
        return ids[len(prompt) :], logprobs

    @property
    def ends(self) -> set[int]:
        """The tokens that end an answer."""
        found: set[int] = set()
        for config in (getattr(self.model, "generation_config", None), self.model.config, self.tokenizer):
            end = getattr(config, "eos_token_id", None)
            found |= set(end) if isinstance(end, (list, tuple)) else {end} if isinstance(end, int) else set()
        return found


def _task(name: str) -> str:
    """The adapter's name in the bank, which allows no dot."""
    return name.replace("%", "%25").replace(".", "%2E")
