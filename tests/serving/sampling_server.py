"""A server of a folder of adapters that samples as vLLM does: token ids in and out, several answers to a prompt."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

import prefixcore
from prefixcore.adapters import AdapterError, adapter_digest, read_adapter
from tests import tiny


def is_served(folder: Path) -> bool:
    config = read_adapter(folder).config
    return isinstance(config, prefixcore.PrefixTuningConfig) and config.layers is None


def make_model() -> Any:
    """The tiny model with larger weights, so that it prefers some answers, and a prefix changes which."""
    model = tiny.model()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(6)
    return model


class SamplingServer:
    """For `fake_openai.serving`.

    Args:
        adapters: the folder, looked into at each request.
        processed: whether log-probabilities are of what was sampled from; else of the model's own distribution.

    Attributes:
        requests: the bodies that were sent.
    """

    def __init__(self, adapters: Path, *, processed: bool = True) -> None:
        self.adapters, self.processed = adapters, processed
        self.requests: list[dict[str, Any]] = []
        self.model = make_model()
        self.lock = threading.Lock()
        self.generator = torch.Generator().manual_seed(0)

    def models(self) -> Any:
        served = [folder for folder in sorted(self.adapters.iterdir()) if is_served(folder)]
        cards = [{"id": folder.name, "digest": adapter_digest(folder)} for folder in served]
        return {"object": "list", "data": [{"id": "base"}, *cards]}

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            self.requests.append(body)
            folder = self.adapters / body["model"]
            if not folder.is_dir():
                return 404, {"error": {"message": f"The model {body['model']!r} does not exist."}}
            if not is_served(folder):
                return 400, {"error": {"message": f"the adapter {folder.name!r} cannot be served"}}
            try:
                with prefixcore.load(self.model, folder):
                    prompts = body["prompt"]
                    if isinstance(prompts, str):
                        prompts = [tiny.tokenizer()(prompts)["input_ids"]]
                    choices = [self._sample(prompt, body) for prompt in prompts for _ in range(body.get("n", 1))]
            except AdapterError as error:
                return 400, {"error": {"message": str(error)}}
        return 200, {"choices": [{"index": i, **choice} for i, choice in enumerate(choices)][::-1]}

    @torch.no_grad()
    def _sample(self, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
        ids, logprobs = list(prompt), []
        generator = torch.Generator().manual_seed(body["seed"]) if "seed" in body else self.generator
        for _ in range(body["max_tokens"]):
            plain = self.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            scores = plain / body.get("temperature", 1.0)
            if (allowed := body.get("allowed_token_ids")) is not None:
                scores = torch.full_like(scores, -torch.inf).index_copy(0, torch.tensor(allowed), scores[allowed])
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
            logprobs.append(float((scores if self.processed else plain).log_softmax(-1)[token]))
            ids.append(token)
        return {"token_ids": ids[len(prompt) :], "logprobs": {"token_logprobs": logprobs}}
