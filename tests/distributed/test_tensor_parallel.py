"""transformers' tensor parallelism in two processes: equal to one process, and whole adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import LlamaConfig, LlamaForCausalLM

import prefixcore
from prefixcore.hf.attention.recording import AttentionCall, _with_all_heads
from prefixcore.hf.model.tensor_parallel import HeadGroup, head_group
from tests import tiny
from tests.distributed import launch
from tests.distributed.tensor_parallel import SCRATCH
from tests.distributed.training import CONFIGS, IDS, assert_same_training, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensor-parallel")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Mapping[str, Any]]:
    if Version(transformers.__version__) < Version("5.16"):
        pytest.skip("attach refuses the model before transformers 5.16: its parts of a weight are no DTensors")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 98}
    odd = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=1, head_dim=16)
    LlamaForCausalLM(odd).save_pretrained(folder / "odd")
    return launch.run("tensor_parallel", folder, tiny.folder(folder / "base"), folder / "odd")


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_train_as_one(ranks: Any, folder: Path, name: str) -> None:
    handle = prefixcore.attach(tiny.model(), CONFIGS[name])
    alone = train(handle, handle.model, IDS)
    assert_same_training([rank[name] for rank in ranks], alone, name)
    handle.model.eval()
    mask = torch.ones_like(IDS)
    generated = handle.model.generate(IDS, attention_mask=mask, max_new_tokens=5, do_sample=False)
    for rank in ranks:
        assert rank[f"{name} numbers"] == handle.num_trainable
        assert torch.equal(rank[f"{name} generated"], generated)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_of_two_processes_is_whole(ranks: Any, folder: Path, name: str) -> None:
    with prefixcore.load(tiny.model(), folder / name, trainable=True) as handle:
        for got, trained in zip(handle.parameters(), ranks[0][name]["values"], strict=True):
            assert torch.equal(got, trained)
        loss = handle.model(IDS, labels=IDS).loss
    for rank in ranks:
        torch.testing.assert_close(rank[f"{name} loaded"], loss.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SCRATCH)
def test_processes_agree_on_values_that_each_has_drawn(ranks: Any, name: str) -> None:
    for one, other in zip(ranks[0][f"{name} drawn"], ranks[1][f"{name} drawn"], strict=True):
        assert torch.equal(one, other)


def test_attention_of_a_process_sees_its_own_heads(ranks: Any) -> None:
    assert [rank["heads"] for rank in ranks] == [[1, 1], [1, 1]]


def test_heads_that_cannot_be_shared_out_are_refused(ranks: Any) -> None:
    for rank in ranks:
        assert rank["odd"].startswith("NotImplementedError: LlamaForCausalLM cannot be given a prefix")


class Mesh:
    """Of two processes, as a model of transformers keeps it."""

    ndim = 1

    def __init__(self, *names: str) -> None:
        self.mesh_dim_names = names or None

    def size(self) -> int:
        return 2


def test_a_share_of_query_heads_alone_is_refused() -> None:
    """Where every process has all key/value heads and some of the query heads, which belong together is not known."""

    key = torch.zeros(1, 2, 3, 16)
    call = AttentionCall(torch.nn.Identity(), "layers.0", 2, key, key, {})
    with pytest.raises(
        NotImplementedError, match="2 query and 2 key/value heads in this process, one of 2 that share 4"
    ):
        _with_all_heads(tiny.model(), call, HeadGroup(Mesh()))


def test_the_mesh_of_older_transformers_has_no_names() -> None:
    """Before 5.18 it is that of tensor parallelism alone; a newer one says which of its dimensions is."""
    model: Any = tiny.model()
    for mesh, size in ((Mesh(), 2), (Mesh("tp"), 2), (Mesh("fsdp"), None)):
        model._device_mesh = mesh
        group = head_group(model)
        assert (group.size if group else None) == size


@pytest.mark.parametrize("config", [prefixcore.PrefixTuningConfig(2), prefixcore.PromptTuningConfig(2)])
def test_parts_that_do_not_say_so_are_refused(config: Any, tmp_path: Path) -> None:
    """As with transformers 5.13 to 5.15."""
    with prefixcore.attach(tiny.model(), config) as handle:
        handle.save(tmp_path / "a")
    model: Any = tiny.model()
    model._device_mesh = Mesh()
    for start in (lambda: prefixcore.attach(model, config), lambda: prefixcore.load(model, tmp_path / "a")):
        with pytest.raises(NotImplementedError, match=r"over 2 processes and do not say so.*transformers 5\.16"):
            start()
