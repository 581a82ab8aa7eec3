"""A world's model in vLLM beside transformers, with prefixes and without."""

from __future__ import annotations

from typing import Any

import torch

import prefixcore
from prefixcore.serving.before_start import describe_model
from prefixcore.serving.catalog import Catalog

from .engines import Engine
from .world import World, prompts

NAMES = (None, "family-17", "family-64")
Pairs = list[tuple[str | None, list[int]]]


def compare(world: World, **options: Any) -> None:
    """Asserts that greedy tokens are equal; `options`: vLLM's."""
    pairs = _pairs(world)
    expected = [world.answer(*pair) for pair in pairs]
    assert len(set(map(tuple, expected))) == len(pairs)
    engine = Engine(world, enforce_eager=True, **options)
    try:
        assert engine.tokens([world.request(*pair) for pair in pairs]) == expected
    finally:
        engine.close()


def compare_in_bfloat16(world: World, **options: Any) -> None:
    """Asserts that log-probabilities are equal but for rounding, and not those of another prefix, or of none.

    For layers that vLLM has on the CPU in bfloat16 alone. Rounding changes some of a random model's tokens, so each is
    looked at behind those that vLLM has generated before it. `options`: vLLM's.
    """
    pairs = _pairs(world)
    engine = Engine(world, enforce_eager=True, dtype="bfloat16", **options)
    try:
        outputs = [output.outputs[0] for output in engine.run([world.request(*pair) for pair in pairs], logprobs=0)]
    finally:
        engine.close()
    difference = {(name, other): 0.0 for name in NAMES for other in NAMES}
    for (name, prompt), output in zip(pairs, outputs, strict=True):
        scores = zip(output.token_ids, output.logprobs, strict=True)
        found = torch.tensor([entry[token].logprob for token, entry in scores])
        for other in NAMES:
            expected = _log_probabilities(world, other, prompt, list(output.token_ids))
            difference[name, other] += (expected - found).abs().mean().item() * len(NAMES) / len(pairs)
    for name, other in difference:
        own = difference[name, name]
        assert own < 0.1 if other == name else difference[name, other] > 3 * own, difference


def _pairs(world: World) -> Pairs:
    for size in (17, 64):
        world.add(f"family-{size}", size, seed=size)
    assert Catalog(world.registry, describe_model(str(world.folder))).problems() == {}
    return [(name, prompt) for name in NAMES for prompt in prompts(3, seed=8)]


@torch.no_grad()
def _log_probabilities(world: World, name: str | None, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Of an answer's tokens, by transformers in float32."""
    ids = torch.tensor([prompt + answer])
    if name is None:
        logits = world.model(ids).logits
    else:
        with prefixcore.load(world.model, world.registry / name):
            logits = world.model(ids).logits
    scores = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return scores.gather(-1, torch.tensor(answer)[:, None])[:, 0]
