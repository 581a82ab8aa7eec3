"""A world's model in vLLM beside transformers, with prefixes and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from prefixcore.serving.before_start import describe_model
from prefixcore.serving.catalog import Catalog

from .engines import Engine
from .world import World, prompts

NAMES = (None, "family-17", "family-64")
Asked = tuple[str | None, Any]
Score = Callable[[str | None, Any, list[int]], torch.Tensor]


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
    check_closeness(pairs, outputs, lambda name, prompt, answer: world.score(name, torch.tensor([prompt]), answer))


def check_closeness(asked: list[Asked], outputs: list[Any], score: Score) -> None:
    """Asserts that log-probabilities are those of the adapter that was asked, on average over its requests.

    Args:
        asked: an adapter's name and a prompt, of each request.
        outputs: vLLM's, with log-probabilities.
        score: the reference's log-probabilities of an answer, of a name, a prompt and the answer's tokens.
    """
    difference = {(name, other): 0.0 for name in NAMES for other in NAMES}
    for (name, prompt), output in zip(asked, outputs, strict=True):
        scores = zip(output.token_ids, output.logprobs, strict=True)
        found = torch.tensor([entry[token].logprob for token, entry in scores])
        for other in NAMES:
            expected = score(other, prompt, list(output.token_ids))
            difference[name, other] += (expected - found).abs().mean().item() * len(NAMES) / len(asked)
    for name, other in difference:
        own = difference[name, name]
        assert own < 0.1 if other == name else difference[name, other] > 3 * own, difference


def _pairs(world: World) -> list[Asked]:
    for size in (17, 64):
        world.add(f"family-{size}", size, seed=size)
    assert Catalog(world.registry, describe_model(str(world.folder))).problems() == {}
    return [(name, prompt) for name in NAMES for prompt in prompts(3, seed=8)]
