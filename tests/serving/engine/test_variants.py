"""Engines of other shapes: two workers that share the heads, half precision, speculation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import prefixcore

from .engines import Engine
from .world import World, prompts


@contextmanager
def running(world: World, **options: Any) -> Iterator[Engine]:
    engine = Engine(world, **{"enforce_eager": True, "block_size": 32, **options})
    try:
        yield engine
    finally:
        engine.close()


def mixed(world: World) -> list[tuple[str | None, list[int]]]:
    for size in (17, 64):
        world.add(f"variant-{size}", size, seed=size)
    return [(name, prompt) for name in ("variant-17", "variant-64", None) for prompt in prompts(4, seed=5)]


def test_two_workers_share_the_heads(world: World) -> None:
    pairs = mixed(world)
    world.add("damaged-for-two", 20)
    bad = world.request("damaged-for-two", [5, 6])
    file = world.registry / "damaged-for-two" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")  # found by the workers, each for itself
    with running(world, tensor_parallel_size=2, distributed_executor_backend="mp") as engine:
        for _ in range(2):
            failed, *outputs = engine.run([bad, *(world.request(*pair) for pair in pairs)])
            assert failed.outputs[0].finish_reason == "error"
            assert [list(output.outputs[0].token_ids) for output in outputs] == [world.answer(*pair) for pair in pairs]


def test_half_precision(world: World) -> None:
    """Log-probabilities of the first token beside transformers in float32: rounding apart, and far from no prefix."""
    pairs = mixed(world)
    with running(world, dtype="bfloat16") as engine:
        outputs = engine.run([world.request(*pair) for pair in pairs], 1, logprobs=5)
    for (name, prompt), output in zip(pairs, outputs, strict=True):
        expected = first_token_log_probabilities(world, name, prompt)
        bare = first_token_log_probabilities(world, None, prompt)
        found = {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}
        error = max(abs(expected[token].item() - value) for token, value in found.items())
        assert error < 0.25, (name, prompt, error)
        if name is not None:
            assert max(abs(bare[token].item() - value) for token, value in found.items()) > 4 * error


def first_token_log_probabilities(world: World, name: str | None, prompt: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        if name is None:
            return world.model(ids).logits[0, -1].log_softmax(-1)
        with prefixcore.load(world.model, world.registry / name):
            return world.model(ids).logits[0, -1].log_softmax(-1)


def test_speculation_from_the_prompt(world: World) -> None:
    """Guesses that the model does not confirm change nothing, placeholders among them."""
    pairs = [(name, prompt * 4) for name, prompt in mixed(world)]
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with running(world, speculative_config=speculation) as engine:
        found = engine.tokens([world.request(*pair) for pair in pairs], 32)
    assert found == [world.answer(*pair, 32) for pair in pairs]
