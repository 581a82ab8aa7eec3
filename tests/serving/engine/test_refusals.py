"""A request that cannot have its prefix ends with an error; its neighbours' tokens are untouched, the server lives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import prefixcore
from prefixcore.serving.salt import make_salt

from .engines import Engine
from .world import World, prompts

KEPT = 2 * 3 * 2 * 64 * 32 * 4 * 2
"""Bytes of the host cache: two prefixes of 64 virtual tokens (three layers, keys and values, two heads of 32)."""


@pytest.fixture(scope="module")
def engine(world: World) -> Iterator[Engine]:
    for i in range(3):
        world.add(f"good-{i}", 64, seed=100 + i)
    engine = Engine(world, {"host_cache_bytes": KEPT}, enforce_eager=True, block_size=32, scheduling_policy="priority")
    yield engine
    engine.close()


def ends_alone(engine: Engine, world: World, bad: dict[str, Any], **sampling: Any) -> None:
    """The bad request between good ones, twice: an error, and their own tokens."""
    pairs = [("good-0", prompts(2, seed=1)[1]), (None, prompts(2, seed=2)[1]), ("good-1", prompts(2, seed=3)[1])]
    good = [world.request(*pair) for pair in pairs]
    expected = [world.answer(*pair) for pair in pairs]
    alone = {name: [None, value, None, None] for name, value in sampling.items()}
    for _ in range(2):
        first, failed, *rest = engine.run([good[0], bad, *good[1:]], **alone)
        assert failed.outputs[0].finish_reason == "error"
        assert not failed.outputs[0].token_ids
        assert [list(output.outputs[0].token_ids) for output in (first, *rest)] == expected


def test_no_such_adapter(engine: Engine, world: World) -> None:
    request = world.request("good-2", [5, 6])
    ends_alone(engine, world, {**request, "cache_salt": make_salt("nowhere", world.digest("good-2"))})


def test_another_digest(engine: Engine, world: World) -> None:
    request = world.request("good-2", [5, 6])
    ends_alone(engine, world, {**request, "cache_salt": make_salt("good-2", "0" * 64)})


def test_a_replaced_adapter_by_its_old_digest(engine: Engine, world: World) -> None:
    old = world.add("old", 20, seed=1)
    request = world.request("old", [5, 6])
    assert engine.tokens([request]) == [world.answer("old", [5, 6])]
    world.add("old", 20, seed=2)
    ends_alone(engine, world, request)
    assert engine.tokens([world.request("old", [5, 6])]) == [world.answer("old", [5, 6])]
    assert old != world.digest("old")


@pytest.mark.parametrize("salt", ["prefixcore:", "prefixcore:good-0", "prefixcore:good-0:12", "prefixcore:../good-0:"])
def test_a_salt_that_names_nothing(engine: Engine, world: World, salt: str) -> None:
    ends_alone(engine, world, {**world.request("good-0", [5, 6]), "cache_salt": salt + "0" * 64 * salt.endswith(":")})


def flip_a_bit(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def empty(folder: Path) -> None:
    (folder / "prefixcore_manifest.json").write_bytes(b"")


def vanish(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize("damage", [flip_a_bit, cut, empty, vanish])
def test_damaged_files(engine: Engine, world: World, damage: Callable[[Path], None]) -> None:
    world.add("damaged", 20, seed=4)
    request = world.request("damaged", [5, 6])
    damage(world.registry / "damaged")
    ends_alone(engine, world, request)
    shutil.rmtree(world.registry / "damaged", ignore_errors=True)
    world.add("damaged", 20, seed=5)  # mended
    assert engine.tokens([world.request("damaged", [5, 6])]) == [world.answer("damaged", [5, 6])]


def test_an_adapter_for_another_model(engine: Engine, world: World, tmp_path: Path) -> None:
    """The same architecture and other weights: only the checkpoint's numbers tell."""
    other = World(tmp_path)
    with torch.no_grad():
        other.model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    other.add("foreign", 20)
    shutil.copytree(other.registry / "foreign", world.registry / "foreign")
    ids = [0] * 20 + [5, 6]
    salt = make_salt("foreign", world.digest("foreign"))
    ends_alone(engine, world, {"prompt_token_ids": ids, "cache_salt": salt})


def test_an_adapter_with_other_shapes(engine: Engine, world: World, tmp_path: Path) -> None:
    other = World(tmp_path, num_key_value_heads=4)
    other.add("wide", 20)
    shutil.copytree(other.registry / "wide", world.registry / "wide")
    salt = make_salt("wide", world.digest("wide"))
    ends_alone(engine, world, {"prompt_token_ids": [0] * 20 + [5, 6], "cache_salt": salt})


def test_a_soft_prompt_that_was_not_baked(engine: Engine, world: World) -> None:
    with prefixcore.attach(world.model, prefixcore.PromptTuningConfig(num_virtual_tokens=20, init="random")) as handle:
        handle.save(world.registry / "soft")
    salt = make_salt("soft", world.digest("soft"))
    ends_alone(engine, world, {"prompt_token_ids": [0] * 20 + [5, 6], "cache_salt": salt})


def test_a_prefix_of_some_layers(engine: Engine, world: World) -> None:
    config = prefixcore.PrefixTuningConfig(num_virtual_tokens=20, init="random", layers=[0, 2])
    with prefixcore.attach(world.model, config) as handle:
        handle.save(world.registry / "some-layers")
    salt = make_salt("some-layers", world.digest("some-layers"))
    ends_alone(engine, world, {"prompt_token_ids": [0] * 20 + [5, 6], "cache_salt": salt})


@pytest.mark.parametrize(
    "ids",
    [[5, 6], [0], [0] * 63, [0] * 64, [0] * 63 + [5, 6], [5] + [0] * 64, [0] * 65 + [5]],
    ids=["none", "one", "too-few", "no-text", "one-less", "behind-text", "one-more"],
)
def test_placeholders(engine: Engine, world: World, ids: list[int]) -> None:
    salt = make_salt("good-0", world.digest("good-0"))
    ends_alone(engine, world, {"prompt_token_ids": ids, "cache_salt": salt})


def test_log_probabilities_of_the_prompt(engine: Engine, world: World) -> None:
    """With which vLLM would leave the prefix out."""
    ends_alone(engine, world, world.request("good-0", [5, 6]), prompt_logprobs=1)


def test_reading_no_cache(engine: Engine, world: World) -> None:
    ends_alone(engine, world, world.request("good-0", [5, 6]), skip_reading_prefix_cache=True)


def test_log_probabilities_of_the_prompt_without_a_prefix(engine: Engine, world: World) -> None:
    """Are not the connector's business."""
    (output,) = engine.run([world.request(None, [5, 6, 7])], prompt_logprobs=1)
    assert len(output.prompt_logprobs) == 3


def test_a_salt_of_somebody_elses(engine: Engine, world: World) -> None:
    request = {"prompt_token_ids": [5, 6, 7], "cache_salt": "tenant 7"}
    assert engine.tokens([request]) == [world.answer(None, [5, 6, 7])]


def test_more_adapters_than_the_host_cache_holds(engine: Engine, world: World) -> None:
    """Three hundred, in an order that misses the cache of two nearly every time."""
    names = [f"many-{i}" for i in range(300)]
    prompt = prompts(2, seed=21)[1]
    for i, name in enumerate(names):
        world.add(name, 1 + i % 90, seed=i)
    requests = [world.request(name, prompt) for name in names]
    assert engine.tokens(requests, 8) == [world.answer(name, prompt, 8) for name in names]


def test_urgent_requests_come_first_and_all_are_right(engine: Engine, world: World) -> None:
    pairs = [(f"good-{i % 3}", prompt) for i, prompt in enumerate(prompts(12, seed=31))]
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    requests = [world.request(*pair) for pair in pairs]
    outputs = engine.llm.generate(requests, sampling, use_tqdm=False, priority=[i % 4 for i in range(len(pairs))])
    assert [list(output.outputs[0].token_ids) for output in outputs] == [world.answer(*pair) for pair in pairs]


def test_the_manifest_is_believed_only_with_its_digest(engine: Engine, world: World) -> None:
    """Who edits a manifest makes another adapter of it."""
    world.add("edited", 20, seed=6)
    request = world.request("edited", [5, 6])
    file = world.registry / "edited" / "prefixcore_manifest.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "task": "something else"}))
    ends_alone(engine, world, request)
