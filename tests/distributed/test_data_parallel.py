"""Two processes, each with half of the batch, by DDP and by FSDP2: what one process computes of the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import prefixcore
from prefixcore.adapters import read_adapter
from prefixcore.hf.baking.publishing import Publisher
from tests import tiny
from tests.distributed import launch
from tests.distributed.data_parallel import CASES
from tests.distributed.training import CONFIGS, IDS, assert_same_training, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data parallel")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Mapping[str, Any]]:
    return launch.run("data_parallel", folder)


@pytest.mark.parametrize(("name", "how"), CASES)
def test_two_processes_train_as_one(ranks: Any, folder: Path, name: str, how: str) -> None:
    handle = prefixcore.attach(tiny.model(), CONFIGS[name])
    alone = train(handle, handle.model, IDS)
    assert_same_training([rank[f"{name} {how}"] for rank in ranks], alone, f"{name} {how}")
    with prefixcore.load(tiny.model(), folder / f"{name} {how}", trainable=True) as loaded:
        for got, trained in zip(loaded.parameters(), ranks[0][f"{name} {how}"]["values"], strict=True):
            assert torch.equal(got, trained), "what is saved is what was trained"


@pytest.mark.parametrize(("name", "how"), CASES)
def test_what_is_published_is_what_one_process_publishes(
    ranks: Any, folder: Path, tmp_path: Path, name: str, how: str
) -> None:
    with prefixcore.load(tiny.model(), folder / f"{name} {how}", trainable=True) as loaded:
        Publisher(loaded, tmp_path / "alone").write()
    alone, published = (read_adapter(x).tensors for x in (tmp_path / "alone", folder / f"published {name} {how}"))
    torch.testing.assert_close(published, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "how"), CASES)
def test_all_weights_stay_frozen(ranks: Any, name: str, how: str) -> None:
    for rank in ranks:
        assert rank[f"{name} {how}"]["not frozen"] == []


@pytest.mark.parametrize(("name", "how"), CASES)
def test_an_average_is_of_whole_parameters(ranks: Any, name: str, how: str) -> None:
    in_parts = how == "fsdp" or how.startswith("fsdp of accelerate")
    for rank in ranks:
        why = rank[f"{name} {how}"]["why no average"]
        assert (why is not None) == in_parts, why
        assert why is None or why.startswith(
            "several processes have the parameters in parts (FSDP2 or DeepSpeed's ZeRO-3)"
        )


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_processes_agree_on_values_that_each_has_drawn(ranks: Any, kind: str) -> None:
    for one, other in zip(ranks[0][kind], ranks[1][kind], strict=True):
        assert torch.equal(one, other)


def test_context_parallelism_is_refused(ranks: Any) -> None:
    for rank in ranks:
        for name in ("prefix", "prompt"):
            assert rank["refused"][name].startswith("context parallelism gives each process a part of every sequence")


def test_one_process_uploads_what_is_in_parts(ranks: Any) -> None:
    assert sorted(rank["pushed"] for rank in ranks) == [[], ["somebody/prefix"]]


def test_nothing_is_left_beside_the_adapters(ranks: Any, folder: Path) -> None:
    names = {path.name for path in folder.iterdir() if not path.name.endswith(".pt")}
    assert names == {f"{kind}{name} {how}" for name, how in CASES for kind in ("", "published ")}
