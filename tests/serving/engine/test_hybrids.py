"""Layers with a state between those with attention: what holds of keys and values holds of states.

The tests of `test_tokens` once more, with a model of which half the layers are state spaces. vLLM keeps the states of a
request where it reuses them for others, and hands each on in a block of another kind than keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .engines import Engine
from .test_tokens import (
    SIZES,
    both,
    test_a_mixed_batch,
    test_a_replaced_adapter_never_hits_an_old_block,
    test_one_prefix,
    test_the_prefix_changes_the_answer,
    test_two_prefixes_of_one_length_never_share_a_block,
)
from .test_variants import test_two_workers_share_the_heads
from .world import World, prompts

__all__ = [
    "test_a_mixed_batch",
    "test_a_replaced_adapter_never_hits_an_old_block",
    "test_one_prefix",
    "test_the_prefix_changes_the_answer",
    "test_two_prefixes_of_one_length_never_share_a_block",
    "test_two_workers_share_the_heads",
]

HYBRID = {
    "num_hidden_layers": 4,
    "layer_types": ["mamba", "attention", "mamba", "attention"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "attention_multiplier": 1.0,  # so that a prefix changes what is generated
    "shared_intermediate_size": 64,
    "position_embedding_type": "rope",
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
}
REUSED = {"enable_prefix_caching": True, "max_num_batched_tokens": 64}
"""vLLM 0.32 on the CPU ends when a longer step reads a prompt over the end of a block, without prefixes as well."""
ENGINES = {
    # Blocks are in short supply. States at the ends of blocks, which are reused; and one a request, which is its own.
    "reused": REUSED | {"num_gpu_blocks_override": 24},
    "single": {"enable_prefix_caching": False, "num_gpu_blocks_override": 24},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(Path(tmp_path_factory.mktemp("hybrid")), "granitemoehybrid", **HYBRID)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, world: World) -> Iterator[Engine]:
    for size in SIZES:
        world.add(f"tokens-{size}", size, seed=size)
    engine = Engine(world, **{"enforce_eager": True, "max_num_seqs": 32, **ENGINES[request.param]})
    yield engine
    engine.close()


def test_a_state_is_hit_with_its_prefix(world: World) -> None:
    """The state behind a prefix and the text's first blocks is kept, and is not that of another prefix, or of none."""
    names = [None, "twin-a", "twin-b"]
    for seed, name in enumerate(names[1:], 1):
        world.add(name, 128, seed=seed)
    prompt = (prompts(2, seed=11)[1] * 200)[:150]
    engine = Engine(world, enforce_eager=True, **REUSED)
    try:
        requests, expected = both(world, [(name, prompt) for name in names])
        assert len(set(map(tuple, expected))) == len(names)
        for _ in range(3):
            outputs = engine.run(requests)
            assert [list(output.outputs[0].token_ids) for output in outputs] == expected
        assert [output.num_cached_tokens for output in outputs] == [128, 256, 256]
    finally:
        engine.close()
