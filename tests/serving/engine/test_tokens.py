"""The tokens are transformers' own, whatever the engine does with blocks, batches and time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .engines import Engine
from .world import World, prompts

SIZES = (1, 17, 64, 200)
ENGINES = {
    # Prefixes longer than what one step may compute, more blocks in demand than there are: chunks and preemptions.
    "eager-32": {"enforce_eager": True, "block_size": 32, "num_gpu_blocks_override": 40, "max_num_batched_tokens": 64},
    "compiled-128": {"enforce_eager": False, "block_size": 128},
}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, world: World) -> Iterator[Engine]:
    for size in SIZES:
        world.add(f"tokens-{size}", size, seed=size)
    engine = Engine(world, **{"max_num_seqs": 32, **ENGINES[request.param]})
    yield engine
    engine.close()


def both(world: World, pairs: list[tuple[str | None, list[int]]], tokens: int = 16) -> tuple[list[Any], list[Any]]:
    """The requests, and what transformers answers."""
    return [world.request(*pair) for pair in pairs], [world.answer(*pair, tokens) for pair in pairs]


@pytest.mark.parametrize("size", SIZES)
def test_one_prefix(engine: Engine, world: World, size: int) -> None:
    requests, expected = both(world, [(f"tokens-{size}", prompt) for prompt in prompts(4, seed=size)])
    assert engine.tokens(requests) == expected
    assert engine.tokens(requests) == expected  # from cached blocks, as far as whole ones are


def test_the_prefix_changes_the_answer(world: World) -> None:
    """Without which the other tests would say nothing."""
    prompt = prompts(2)[1]
    for size in SIZES:
        world.add(f"tokens-{size}", size, seed=size)
    answers = {tuple(world.answer(name, prompt)) for name in [None, *(f"tokens-{size}" for size in SIZES)]}
    assert len(answers) == len(SIZES) + 1


def test_a_mixed_batch(engine: Engine, world: World) -> None:
    """Several prefixes and none, long answers: more blocks than there are in the first engine."""
    names = [None, *(f"tokens-{size}" for size in SIZES)]
    requests, expected = both(world, [(name, prompt) for prompt in prompts(6, seed=7) for name in names], 48)
    assert engine.tokens(requests, 48) == expected


def test_two_prefixes_of_one_length_never_share_a_block(engine: Engine, world: World) -> None:
    """The same placeholders and the same text, so that only the salt tells them apart; blocks are full."""
    prompt = prompts(2, seed=9)[1] * 8
    world.add("twin-a", 128, seed=1)
    world.add("twin-b", 128, seed=2)
    for _ in range(2):
        requests, expected = both(world, [("twin-a", prompt), ("twin-b", prompt), ("twin-a", prompt)])
        assert expected[0] != expected[1]
        for request, tokens in zip(requests, expected, strict=True):
            assert engine.tokens([request]) == [tokens]


def test_cached_blocks_are_hit(engine: Engine, world: World) -> None:
    """A second request with the same prefix and text begins where the first one's whole blocks end."""
    world.add("hit", 128, seed=3)
    prompt = (prompts(2, seed=11)[1] * 200)[:150]  # with the prefix two blocks of 128
    requests, expected = both(world, [("hit", prompt)])
    first, second = engine.run(requests)[0], engine.run(requests)[0]
    assert [list(first.outputs[0].token_ids), list(second.outputs[0].token_ids)] == [*expected, *expected]
    assert second.num_cached_tokens >= 256 > 150


def test_a_replaced_adapter_never_hits_an_old_block(engine: Engine, world: World) -> None:
    prompt = (prompts(2, seed=13)[1] * 200)[:150]
    for seed in (1, 2, 3):  # put there, and twice replaced, while the engine runs
        world.add("replaced", 128, seed=seed)
        requests, expected = both(world, [("replaced", prompt)] * 2)
        assert engine.tokens(requests[:1]) + engine.tokens(requests) == [expected[0], *expected]


def test_several_samples_of_one_request(engine: Engine, world: World) -> None:
    requests, expected = both(world, [("tokens-17", prompts(3)[2]), (None, prompts(3)[1])])
    from vllm import SamplingParams

    sampling = SamplingParams(n=3, temperature=1.0, max_tokens=16, ignore_eos=True, detokenize=False, top_k=1)
    for output, tokens in zip(engine.llm.generate(requests, sampling, use_tqdm=False), expected, strict=True):
        assert [list(each.token_ids) for each in output.outputs] == [tokens] * 3
