"""Whatever a base model's weights and configuration are, what was trained on it is saved and loads again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import cpu_offload, disk_offload
from torch import nn
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

import prefixcore
from prefixcore import AdapterError, PrefixTuningConfig, PromptTuningConfig
from prefixcore.adapters import Manifest, compare_fingerprints, fingerprint, read_adapter, whole
from tests.distributed.launch import leave

from .models import make_model
from .quantized import Int8, Opaque, quantize

IDS = torch.tensor([[5, 6, 7]])


def test_a_configuration_whose_layers_differ(tmp_path: Path) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        config = Gemma4TextConfig(
            vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, hidden_size_per_layer_input=0, num_kv_shared_layers=0,
            layer_types=["sliding_attention", "full_attention"], sliding_window=64,
        )  # fmt: skip
        return Gemma4ForCausalLM(config).eval()

    model = make()
    handle = prefixcore.attach(model, PrefixTuningConfig(3, seed=0))
    handle.save(tmp_path / "a")
    expected = model(IDS).logits
    again = make()
    with prefixcore.load(again, tmp_path / "a"):
        torch.testing.assert_close(again(IDS).logits, expected)
    manifest = Manifest.create(model, PromptTuningConfig(3, init="random"))
    try:
        head_dim = model.config.head_dim
    except RuntimeError:  # by transformers after 5.13, because it may differ from layer to layer
        assert manifest.base_model["head_dim"] is None
        assert any(line.startswith("head_dim: ") for line in manifest.base_model["left_out"])
    else:
        assert manifest.base_model["head_dim"] == head_dim
    compare_fingerprints(manifest.base_model, fingerprint(make()))
    compare_fingerprints({**manifest.base_model, "head_dim": 8, "left_out": []}, fingerprint(make()))
    with pytest.raises(AdapterError, match="num_attention_heads"):
        compare_fingerprints({**manifest.base_model, "num_attention_heads": 8}, fingerprint(make()))


@pytest.mark.parametrize("kind", [Int8, Opaque])
def test_tensors_that_refuse_to_be_read(kind: type[Int8], tmp_path: Path) -> None:
    model = make_model("llama")
    quantize(model, kind)
    handle = prefixcore.attach(model, PrefixTuningConfig(3, seed=0))
    model(IDS, labels=IDS).loss.backward()
    handle.save(tmp_path / "a")
    base = read_adapter(tmp_path / "a").manifest.base_model  # type: ignore[union-attr]
    assert base["num_parameters"] == make_model("llama").num_parameters()
    named = any("Opaque cannot be read" in line for line in base["left_out"])
    assert named == (kind is Opaque)
    handle.detach()
    with prefixcore.load(model, tmp_path / "a"):
        pass
    with prefixcore.load(make_model("llama"), tmp_path / "a"):  # the same base, not quantised
        pass
    with pytest.raises(AdapterError, match="other weights"):
        prefixcore.load(make_model("llama", seed=1), tmp_path / "a")


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_weights_that_accelerate_keeps_elsewhere(offload: Any, tmp_path: Path) -> None:
    model = make_model("llama")
    plain = fingerprint(model)
    handle = prefixcore.attach(model, PromptTuningConfig(3, seed=0))
    prompt = handle.bake()
    offload(model, *([str(tmp_path / "kept")] if offload is disk_offload else []))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert fingerprint(model) == plain
    handle.save(tmp_path / "a")  # the prompt itself is away too
    assert torch.equal(read_adapter(tmp_path / "a").tensors, prompt)


def test_no_weights_at_all(llama: Any) -> None:
    with torch.device("meta"):
        empty = make_model("llama")
    expected = fingerprint(empty)
    assert expected["weights"] == expected["samples"] == {}
    assert any("on the meta device" in line for line in expected["left_out"])
    with pytest.warns(UserWarning, match="no weights could be; left out: .*meta device"):
        compare_fingerprints(expected, fingerprint(llama))
    with pytest.raises(AdapterError, match="hidden_size"):
        compare_fingerprints({**expected, "hidden_size": 5}, fingerprint(llama))


def test_virtual_tokens_without_values(tmp_path: Path) -> None:
    handle = prefixcore.attach(make_model("llama"), PrefixTuningConfig(3, init="random"))
    handle.model.to("meta")
    with pytest.raises(AdapterError, match="has no values"):
        handle.save(tmp_path / "a")


def _shard_and_save(rank: int, folder: str, port: int) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    whole.PATIENCE = 2.0
    for vocabulary in (62, 61):
        for config in (PrefixTuningConfig(3, seed=0), PromptTuningConfig(3, seed=0)):
            model = make_model("llama", vocab_size=vocabulary)
            handle = prefixcore.attach(model, config)
            expected = handle.bake()
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            if vocabulary == 62:  # the prefix stays whole: one process may save alone
                inner: Any = model.model if isinstance(config, PrefixTuningConfig) else model.lm_head
                fully_shard(inner, mesh=mesh)
            else:
                fully_shard(model, mesh=mesh)
            model(IDS, labels=IDS).loss.backward()
            target = f"{folder}/{vocabulary}-{config.method}"
            if vocabulary == 61:
                if rank == 0:
                    with pytest.raises(AdapterError, match="process 1 has not called save"):
                        handle.save(target)
                dist.barrier()
                handle.save(target)
            elif rank == 0:
                handle.save(target)
            dist.barrier()
            adapter = read_adapter(target)
            for got, want in zip(_flat(adapter.tensors), _flat(expected), strict=True):
                assert torch.equal(got, want)
            compare_fingerprints(fingerprint(make_model("llama", vocab_size=vocabulary)), fingerprint(model))
            with pytest.raises(AdapterError, match="other weights"):
                compare_fingerprints(fingerprint(make_model("llama", 1, vocab_size=vocabulary)), fingerprint(model))
    leave()


def _flat(values: Any) -> list[torch.Tensor]:
    return [values] if isinstance(values, torch.Tensor) else [t for pair in values for t in pair]


def test_sharded_tensors_of_one_process(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    plain, model = fingerprint(make_model("llama")), make_model("llama")
    handle = prefixcore.attach(model, PromptTuningConfig(3, seed=0))
    prompt = handle.bake()
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        model(IDS, labels=IDS).loss.backward()
        handle.save(tmp_path / "a")
        sharded = fingerprint(model)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(read_adapter(tmp_path / "a").tensors, prompt)
    assert sharded["left_out"] == ["weights: sharded over processes, so no digest"]
    assert sharded == {**plain, "weights": {}, "left_out": sharded["left_out"]}


@pytest.mark.slow
def test_sharded_over_processes(tmp_path: Path) -> None:
    """FSDP2, also with rows that do not divide evenly: every process saves, or one alone where nothing is to gather."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_shard_and_save, (str(tmp_path), port), nprocs=2)  # type: ignore[attr-defined]
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("where", ["a buffer", "weight_packed", "W_q"])
def test_weights_packed_by_a_quantiser(where: str, llama: Any) -> None:
    """GPTQ and AWQ, compressed-tensors, HQQ."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            numbers = torch.zeros(4, 4, dtype=torch.int32)
            if where == "a buffer":
                self.register_buffer("qweight", numbers)
            else:
                self.register_parameter(where, nn.Parameter(numbers, requires_grad=False))

    model = make_model("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj = Packed()
    found = fingerprint(model)
    assert found["left_out"][0].startswith(
        "num_parameters: model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj packed"
    )
    compare_fingerprints(found, fingerprint(llama))
    compare_fingerprints(fingerprint(llama), found)
    with pytest.raises(AdapterError, match="other weights"):
        compare_fingerprints(found, fingerprint(make_model("llama", seed=1)))


def test_a_model_that_is_no_transformers_model() -> None:
    assert fingerprint(nn.Linear(3, 3))["num_parameters"] == 12
