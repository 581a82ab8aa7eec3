"""A tiny model, a registry of prefixes for it, and what transformers generates with each: the reference."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import prefixcore
from prefixcore.adapters import adapter_digest
from prefixcore.serving.salt import PLACEHOLDER, make_salt
from tests import tiny

VOCABULARY = 512
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM's attention on the CPU has
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,  # so that a prefix changes what is generated
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


GATED_DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
"""Linear attention of the sizes that vLLM has on the CPU (in bfloat16 alone) in place of some layers."""


class World:
    """A folder `model` and a registry `adapters` in `path`.

    Args:
        path: an empty folder.
        family: the model's type.
        changes: of the model's configuration.
    """

    def __init__(self, path: Path, family: str = "llama", **changes: Any) -> None:
        config = AutoConfig.for_model(family, **{**sizes_of(family), **changes})
        self._write(path, AutoModelForCausalLM, config, tiny.tokenizer())

    def _write(self, path: Path, model_class: Any, config: Any, tokenizer: Any) -> None:
        torch.manual_seed(0)
        self.model = model_class.from_config(config).eval()
        stir(self.model)
        self.folder, self.registry = path / "model", path / "adapters"
        self.model.save_pretrained(self.folder)
        tokenizer.save_pretrained(self.folder)
        self.registry.mkdir()
        self._handles: dict[tuple[str, str], Any] = {}
        self._answers: dict[tuple[str | None, str, tuple[int, ...]], list[int]] = {}

    def add(self, name: str, num_virtual_tokens: int, seed: int = 0) -> str:
        """A random prefix in the registry, in place of one of this name; its digest."""
        config = prefixcore.PrefixTuningConfig(num_virtual_tokens=num_virtual_tokens, init="random", seed=seed)
        with prefixcore.attach(self.model, config) as handle:
            handle.save(self.registry / name)
        digest = adapter_digest(self.registry / name)
        self._handles[name, digest] = config
        return digest

    def digest(self, name: str) -> str:
        """Of the adapter that the registry has now."""
        return adapter_digest(self.registry / name)

    def config_of(self, name: str, digest: str | None = None) -> Any:
        """What `attach` makes an adapter of."""
        return self._handles[name, digest or self.digest(name)]

    def num_virtual_tokens(self, name: str, digest: str | None = None) -> int:
        return self.config_of(name, digest).num_virtual_tokens

    def answer(self, name: str | None, prompt: list[int], tokens: int = 16, digest: str | None = None) -> list[int]:
        """What transformers generates, greedily, with an adapter as it is, or was, in the registry."""
        digest = "" if name is None else digest or self.digest(name)
        key = name, digest, tuple(prompt)
        if len(self._answers.get(key, ())) < tokens:
            if name is None:
                self._answers[key] = self._generate(prompt, tokens)
            else:
                with prefixcore.attach(self.model, self.config_of(name, digest)):
                    self._answers[key] = self._generate(prompt, tokens)
        return self._answers[key][:tokens]

    @torch.no_grad()
    def score(self, name: str | None, ids: torch.Tensor, answer: list[int], **inputs: Any) -> torch.Tensor:
        """The log-probabilities that transformers gives an answer's tokens behind `ids` [1, T]; images: `inputs`."""
        both = torch.cat([ids, torch.tensor([answer])], 1)
        with nullcontext() if name is None else prefixcore.attach(self.model, self.config_of(name)):
            logits = self.model(both, **inputs).logits[0, ids.shape[1] - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]

    def _generate(self, prompt: list[int], tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        made = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
        return made[0, len(prompt) :].tolist()

    def request(self, name: str | None, prompt: list[int], digest: str | None = None) -> dict[str, Any]:
        """The same for vLLM."""
        if name is None:
            return {"prompt_token_ids": prompt}
        digest = digest or self.digest(name)
        ids = [PLACEHOLDER] * self.num_virtual_tokens(name, digest) + prompt
        return {"prompt_token_ids": ids, "cache_salt": make_salt(name, digest)}


def sizes_of(family: str) -> dict[str, Any]:
    """Those of `SIZES` that a family's configuration has: the heads of another would be read out of one too many."""
    default = AutoConfig.for_model(family)
    derived = {name for name in SIZES if isinstance(getattr(type(default), name, None), property)}
    return {name: value for name, value in SIZES.items() if hasattr(default, name) and name not in derived}


@torch.no_grad()
def stir(model: Any) -> None:
    """Norms of ones and weights of zeros hide where they are applied, and in which order: here no two are equal.

    But for the bias by which ERNIE 4.5 chooses its experts: with one, vLLM 0.32 on the CPU answers otherwise than
    transformers, without a prefix as well.
    """
    for name, parameter in model.named_parameters():
        is_ernies = name.endswith("moe_statics.e_score_correction_bias")
        if parameter.ndim == 1 or not (is_ernies or parameter.any()):
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


def prompts(count: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    """Random prompts without the placeholder, the first of a single token."""
    rng = random.Random(seed)
    lengths = [1, *(rng.randint(2, longest) for _ in range(count - 1))]
    return [[rng.randint(1, VOCABULARY - 1) for _ in range(length)] for length in lengths]
