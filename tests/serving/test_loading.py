"""The worker's side: the right numbers in the right slots, read lazily and kept within a bound."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixcore.adapters import read_adapter
from prefixcore.nn import LayerShape
from prefixcore.serving.admission import Load, Step
from prefixcore.serving.catalog import Served
from prefixcore.serving.engine import CachePlace
from prefixcore.serving.heads import local_heads
from prefixcore.serving.host_cache import HostCache, HostPrefix
from prefixcore.serving.loading import Loader

from . import registry as helper

BLOCKS, BLOCK = 6, 4


class Layer:
    """A layer's cache as plain tensors [slots, heads, D]."""

    def __init__(self, heads: int = 2, group: int = 0, block_size: int = BLOCK) -> None:
        self.shape, self.place = LayerShape(heads, 16, 16), CachePlace("layer", group, block_size)
        self.key = torch.full((BLOCKS * BLOCK, heads, 16), float("nan"))
        self.value = self.key.clone()

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        self.key[slots], self.value[slots] = key.float(), value.float()


class States:
    """A layer's states as a plain tensor [blocks, 2]."""

    def __init__(self, group: int, block_size: int) -> None:
        self.place = CachePlace("states", group, block_size)
        self.state = torch.ones(BLOCKS, 2)

    def clear(self, block: int) -> None:
        self.state[block] = 0


def loader(layers: list[Any], heads: slice = slice(0, 2), **options: Any) -> Loader:
    return Loader(layers, heads, **{"dtype": torch.float32, "limit": 2**20, **options})


def load(request_id: str, folder: Path, digest: str, start: int, stop: int, *blocks: list[int]) -> Load:
    return Load(request_id, Served(folder.name, digest, stop, folder=folder), start, stop, list(blocks))


def run(subject: Loader, step: Step) -> tuple[set[str], set[str]]:
    """Steps until something has come of each of its requests: those that have their prefix, and those that failed."""
    wanted = {load.request_id for load in step.loads} | set(step.refused)
    loaded: set[str] = set()
    failed: set[str] = set()
    subject.step(step)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        more = subject.take_results()
        loaded, failed = loaded | more[0], failed | more[1]
        if loaded | failed == wanted:
            return loaded, failed
        subject.step(Step())
    raise AssertionError(f"after half a minute of {wanted} only {loaded} and {failed} have ended")


def test_the_numbers_are_in_their_slots(tmp_path: Path) -> None:
    model, registry, _ = helper.make(tmp_path)
    digest = helper.add(registry, "capitals", model, 5)
    layers = [Layer(), Layer()]
    subject = loader(layers)
    assert run(subject, Step([load("r", registry / "capitals", digest, 0, 5, [4, 2])])) == ({"r"}, set())
    slots = [16, 17, 18, 19, 8]
    for layer, (key, value) in zip(layers, read_adapter(registry / "capitals").tensors, strict=True):
        assert torch.equal(layer.key[slots], key.transpose(0, 1))
        assert torch.equal(layer.value[slots], value.transpose(0, 1))
        assert layer.key.isnan().all(-1).all(-1).sum() == BLOCKS * BLOCK - 5
    subject.close()


def test_groups_of_layers_have_blocks_of_their_own(tmp_path: Path) -> None:
    """The second layer reads another table and other blocks; states of a request begin anew, and no other's do."""
    model, registry, _ = helper.make(tmp_path)
    digest = helper.add(registry, "capitals", model, 5)
    layers, states = [Layer(), Layer(group=2, block_size=8)], [States(1, 4), States(3, 512)]
    subject = loader(layers, states=states)
    asked = load("r", registry / "capitals", digest, 4, 5, [4, 2], [0, 3], [1], [5])
    assert run(subject, Step([asked])) == ({"r"}, set())
    for layer, slot in zip(layers, (8, 12), strict=True):
        assert layer.key.isfinite().all(-1).all(-1).nonzero().tolist() == [[slot]]
    assert [(each.state == 0).all(-1).nonzero().tolist() for each in states] == [[[3]], [[5]]]
    subject.close()


def test_only_what_is_not_cached_is_written(tmp_path: Path) -> None:
    model, registry, _ = helper.make(tmp_path)
    digest = helper.add(registry, "capitals", model, 5)
    layers = [Layer(), Layer()]
    subject = loader(layers)
    run(subject, Step([load("r", registry / "capitals", digest, 4, 5, [4, 2])]))
    assert layers[0].key.isnan().all(-1).all(-1).sum() == BLOCKS * BLOCK - 1
    assert not layers[0].key[8].isnan().any()
    subject.close()


@pytest.mark.parametrize(
    ("heads", "workers", "expected"),
    [
        (8, 1, [(0, 8)]),
        (8, 2, [(0, 4), (4, 8)]),
        (2, 2, [(0, 1), (1, 2)]),
        (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (1, 2, [(0, 1), (0, 1)]),
    ],
)
def test_heads_are_dealt_out_as_vllm_does(heads: int, workers: int, expected: list[tuple[int, int]]) -> None:
    assert [local_heads(heads, workers, rank) for rank in range(workers)] == [slice(*each) for each in expected]


def test_heads_that_cannot_be_dealt_out() -> None:
    with pytest.raises(ValueError, match="cannot be dealt out"):
        local_heads(3, 2, 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_writes_its_own_heads(tmp_path: Path, rank: int) -> None:
    model, registry, _ = helper.make(tmp_path)
    digest = helper.add(registry, "capitals", model, 5)
    layers = [Layer(1), Layer(1)]
    subject = loader(layers, local_heads(2, 2, rank), dtype=torch.bfloat16)
    assert run(subject, Step([load("r", registry / "capitals", digest, 0, 5, [0, 1])])) == ({"r"}, set())
    key = read_adapter(registry / "capitals").tensors[1][0][rank]
    assert torch.equal(layers[1].key[:5, 0], key.bfloat16().float())
    subject.close()


def test_failures_are_each_requests_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, registry, _ = helper.make(tmp_path)
    good, broken = helper.add(registry, "good", model), helper.add(registry, "broken", model)
    file = registry / "broken" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    subject = loader([Layer(), Layer()])
    loads = [
        load("1", registry / "good", good, 0, 5, [0, 1]),
        load("2", registry / "broken", broken, 0, 5, [2, 3]),
        load("3", registry / "good", "0" * 64, 0, 5, [2, 3]),
        load("4", registry / "nowhere", good[::-1], 0, 5, [2, 3]),
    ]
    assert run(subject, Step(loads, refused=["5"])) == ({"1"}, {"2", "3", "4", "5"})
    for reason in ("SHA-256", "was replaced or altered", "nowhere"):
        assert reason in caplog.text
    subject.close()


def test_a_model_of_other_shapes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, registry, _ = helper.make(tmp_path)
    digest = helper.add(registry, "capitals", model)
    subject = loader([Layer(4), Layer(4)])
    assert run(subject, Step([load("r", registry / "capitals", digest, 0, 5, [0, 1])])) == (set(), {"r"})
    assert "layer 0: expected 5 tokens of" in caplog.text
    subject.close()


def test_an_adapter_is_read_once_for_many_requests(tmp_path: Path) -> None:
    model, registry, _ = helper.make(tmp_path)
    digest = helper.add(registry, "capitals", model)
    subject = loader([Layer(), Layer()])
    loads = [load(str(i), registry / "capitals", digest, 0, 5, [0, 1]) for i in range(3)]
    assert run(subject, Step(loads)) == ({"0", "1", "2"}, set())
    shutil.rmtree(registry)
    assert run(subject, Step([load("4", registry / "capitals", digest, 0, 5, [0, 1])])) == ({"4"}, set())
    subject.close()


def test_prefixes_leave_the_host_cache_in_the_order_of_their_use() -> None:
    cache = HostCache(3 * 8)
    one = HostPrefix([(torch.zeros(1), torch.zeros(1))])  # eight bytes
    for digest in "abc":
        cache.put(digest, one)
    assert cache.get("a") is one
    cache.put("d", one)
    assert (cache.get("b"), cache.used, len(cache)) == (None, 24, 3)
    assert all(cache.get(digest) is one for digest in "acd")
    cache.put("large", HostPrefix([(torch.zeros(4), torch.zeros(4))]))
    assert (cache.get("large"), len(cache)) == (None, 3)
