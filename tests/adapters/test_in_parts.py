"""Which model an adapter is for, asked of one whose weights are in parts: each process compares its own numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import prefixcore
from prefixcore.adapters import AdapterError, compare_fingerprints, fingerprint

from .models import make_model


class Zero3:
    """What DeepSpeed's ZeRO-3 makes of a model's parameters, as process `rank` of `size` has them.

    tests/distributed/zero3.py has the real one, where it is installed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rank, self.size, self.group = 0, 2, object()
        monkeypatch.setattr(dist, "get_rank", lambda group: self.rank if group is self.group else 1 / 0)
        monkeypatch.setattr(dist, "get_world_size", lambda group: self.size if group is self.group else 1 / 0)

    def partition(self, model: nn.Module, whole: int = 0) -> Any:
        """`whole`: parameters of as many numbers, or fewer, stay whole in every process."""
        parameter: Any
        for number, parameter in enumerate(model.parameters()):
            parameter.ds_id, parameter.ds_shape, parameter.ds_process_group = number, parameter.shape, self.group
            share = -(-parameter.numel() // self.size)
            flat = torch.full((share * self.size,), torch.nan, dtype=parameter.dtype)  # what fills it up is never set
            flat[: parameter.numel()] = parameter.detach().flatten()
            parameter.ds_tensor = flat[self.rank * share : (self.rank + 1) * share].clone()
            if parameter.numel() > whole:
                parameter.data = torch.empty(0, dtype=parameter.dtype)
        return model


@pytest.fixture
def zero3(monkeypatch: pytest.MonkeyPatch) -> Zero3:
    return Zero3(monkeypatch)


@pytest.mark.parametrize("whole", [0, 100], ids=["all in parts", "small ones whole"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_zero3(zero3: Zero3, size: int, whole: int) -> None:
    """Also by three, which divides few of the weights."""
    expected, other = fingerprint(make_model("llama")), fingerprint(make_model("llama", seed=1))
    zero3.size, seen = size, 0
    for zero3.rank in range(size):
        found = fingerprint(zero3.partition(make_model("llama"), whole))
        assert found["num_parameters"] == expected["num_parameters"]
        for one, two in ((found, expected), (expected, found)):
            compare_fingerprints(one, two)
        for one, two in ((found, other), (other, found)):
            with pytest.raises(AdapterError, match="has the right architecture but other weights"):
                compare_fingerprints(one, two)
        seen += sum(text.count(":") for text in found["samples"].values())
    if not whole:
        assert seen == sum(text.count(":") for text in expected["samples"].values())


def test_zero3_in_bfloat16(zero3: Zero3) -> None:
    model = zero3.partition(make_model("llama").bfloat16())
    compare_fingerprints(fingerprint(make_model("llama")), fingerprint(model))
    with pytest.raises(AdapterError, match="other weights"):
        compare_fingerprints(fingerprint(make_model("llama", seed=1)), fingerprint(model))


@pytest.mark.parametrize("where", ["on a disk", "quantised", "shared out over another group"])
def test_parts_that_cannot_be_read_are_said_and_refuse_nothing(zero3: Zero3, where: str) -> None:
    expected, model = fingerprint(make_model("llama")), zero3.partition(make_model("llama"))
    for parameter in model.parameters():
        if where == "on a disk":
            parameter.ds_tensor = torch.ones(1)
        elif where == "quantised":
            parameter.ds_tensor = parameter.ds_tensor.char()
    zero3.size = 4 if where == "shared out over another group" else 2
    found = fingerprint(model)
    assert not found["samples"]
    for one, two in ((expected, found), (found, expected)):
        with pytest.warns(UserWarning, match=r"no weights could be; left out: .*partitioned by DeepSpeed"):
            compare_fingerprints(one, two)
        with pytest.raises(AdapterError, match="num_hidden_layers"):
            compare_fingerprints({**one, "num_hidden_layers": 7}, two)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _fully_shard(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh)


def _split_heads(model: Any) -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    plan: Any = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("share_out", [_fully_shard, _split_heads], ids=["FSDP2", "tensor parallelism"])
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_an_adapter_is_loaded_for_its_model_alone(share_out: Any, method: str, tmp_path: Path) -> None:
    configs = {"prefix": prefixcore.PrefixTuningConfig(3, seed=0), "prompt": prefixcore.PromptTuningConfig(3, seed=0)}
    with prefixcore.attach(make_model("llama"), configs[method]) as handle:
        handle.save(tmp_path / "a")
    for seed in (0, 1):
        model = make_model("llama", seed=seed)
        share_out(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            if seed:
                with pytest.raises(AdapterError, match="other weights"):
                    prefixcore.load(model, tmp_path / "a")
            else:
                prefixcore.load(model, tmp_path / "a").detach()
