"""Each family that the connector takes unasked, with a prefix and without, beside transformers.

Three that differ most are tried with every change; all of them by `make serve-test ARGS="-m slow"`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefixcore.serving.engine import VERIFIED

from .engines import Engine
from .world import World, prompts

CHANGES: dict[str, dict[str, Any]] = {
    "granite": {"attention_multiplier": 0.2},
    "mistral": {"sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "starcoder2": {"sliding_window": None},
}
"""What a family's configuration has beside the sizes."""

OFTEN = ("cohere", "gemma", "qwen3_moe")
"""Attention beside the MLP, interleaved rotary pairs and LayerNorm; scaled embeddings; experts and normed queries."""


def test_those_that_are_tried_often_are_among_them() -> None:
    assert set(OFTEN) <= set(VERIFIED)


@pytest.mark.parametrize(
    "family", [*OFTEN, *(pytest.param(each, marks=pytest.mark.slow) for each in VERIFIED if each not in OFTEN)]
)
def test_a_family(family: str, tmp_path: Path) -> None:
    world = World(tmp_path, family, **CHANGES.get(family, {}))
    for size in (17, 64):
        world.add(f"family-{size}", size, seed=size)
    pairs = [(name, prompt) for name in (None, "family-17", "family-64") for prompt in prompts(3, seed=8)]
    expected = [world.answer(*pair) for pair in pairs]
    assert len(set(map(tuple, expected))) == len(pairs)
    engine = Engine(world, enforce_eager=True)
    try:
        assert engine.tokens([world.request(*pair) for pair in pairs]) == expected
    finally:
        engine.close()
