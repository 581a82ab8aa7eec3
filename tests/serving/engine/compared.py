"""A world's model in vLLM beside transformers, with prefixes and without."""

from __future__ import annotations

from typing import Any

from prefixcore.serving.before_start import describe_model
from prefixcore.serving.catalog import Catalog

from .engines import Engine
from .world import World, prompts


def compare(world: World, **options: Any) -> None:
    """Asserts that greedy tokens are equal; `options`: vLLM's."""
    for size in (17, 64):
        world.add(f"family-{size}", size, seed=size)
    assert Catalog(world.registry, describe_model(str(world.folder))).problems() == {}
    pairs = [(name, prompt) for name in (None, "family-17", "family-64") for prompt in prompts(3, seed=8)]
    expected = [world.answer(*pair) for pair in pairs]
    assert len(set(map(tuple, expected))) == len(pairs)
    engine = Engine(world, enforce_eager=True, **options)
    try:
        assert engine.tokens([world.request(*pair) for pair in pairs]) == expected
    finally:
        engine.close()
