"""What an attack on the ops found of layouts, dtypes, devices and sizes: each is an error that says how to mend it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import distribute_tensor

import prefixcore

from .op_calls import good

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse_coo": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[0]]),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*good(), "attn_mask"])
def test_a_layout_without_strides_is_named(name: str, layout: str) -> None:
    call = good(attn_mask=torch.zeros(2, 1, 5, 5))
    other = LAYOUTS[layout](call[name])
    for chosen in ("cpu", "reference"):
        with prefixcore.use_backend(chosen), pytest.raises(TypeError, match=f"{name}: expected a dense.*{layout}"):
            prefixcore.prefix_attention(**{**call, name: other})


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize(
    ("name", "layout"), [("input_ids", "sparse_coo"), ("input_ids", "nested"),
                         *((name, layout) for name in ("weight", "virtual") for layout in LAYOUTS)],
)  # fmt: skip
def test_the_embedding_names_it_too(name: str, layout: str) -> None:
    call = {"input_ids": torch.arange(4)[None], "weight": torch.randn(3, 8), "virtual": torch.randn(2, 8)}
    for chosen in ("cpu", "reference"):
        with prefixcore.use_backend(chosen), pytest.raises(TypeError, match=f"{name}: expected a dense.*{layout}"):
            prefixcore.soft_embedding(**{**call, name: LAYOUTS[layout](call[name])})


@pytest.mark.filterwarnings("ignore")
def test_quantized_and_meta_tensors_are_named() -> None:
    quantized = torch.quantize_per_tensor(good()["key"], 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"key: expected torch\.float32 as query, got torch\.qint8"):
        prefixcore.prefix_attention(**good(key=quantized))
    for name in ("key", "value", "prefix_key", "prefix_value"):
        with pytest.raises(ValueError, match=f"{name}: expected device cpu as query, got meta"):
            prefixcore.prefix_attention(**good(**{name: good()[name].to("meta")}))
    with pytest.raises(ValueError, match=r"one device, got \['cpu', 'cpu', 'meta'\]"):
        prefixcore.soft_embedding(torch.arange(4), torch.randn(3, 8), torch.randn(2, 8).to("meta"))


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_a_tensor_of_several_processes_is_named(mesh: DeviceMesh, alone: bool, trained: bool) -> None:
    """It alone among plain ones, as where a model is tensor parallel and its prefix is not, or all of them."""
    call = good()
    call["prefix_key"].requires_grad_(trained)
    names = ("query",) if alone else tuple(call)
    shared = {name: distribute_tensor(call[name].detach(), mesh) for name in names}
    with pytest.raises(TypeError, match=r"query: expected a tensor of this process, got a DTensor.*\.to_local\(\)"):
        prefixcore.prefix_attention(**call | shared)
    rows = distribute_tensor(torch.randn(2, 8), mesh)
    with pytest.raises(TypeError, match=r"virtual: expected a tensor of this process, got a DTensor"):
        prefixcore.soft_embedding(torch.arange(4), torch.randn(3, 8), rows)
    local = {name: x.to_local() for name, x in shared.items()}
    assert torch.equal(prefixcore.prefix_attention(**call | local), prefixcore.prefix_attention(**call))


def test_out_of_memory_names_what_was_asked_for() -> None:
    wide = good(query=good()["query"][:, :, :1].expand(2, 4, 2**30, 8))
    with pytest.raises(RuntimeError, match=r"out of memory: a tensor \[2, 1073741824, 4, 8\].* 274877906944 bytes"):
        prefixcore.prefix_attention(**wide)
    with pytest.raises(RuntimeError, match=r"out of memory: a tensor \[1125899906842624\].*9007199254740992 bytes"):
        prefixcore.soft_embedding(torch.zeros(1, dtype=torch.long).expand(2**50), torch.randn(3, 8), torch.randn(2, 8))


def test_int32_ids_do_not_name_2_31_rows() -> None:
    table, rows = torch.randn(1, 8).expand(2**31 - 1, 8), torch.randn(2, 8)
    for backend in ("cpu", "reference"):
        with prefixcore.use_backend(backend), pytest.raises(TypeError, match=r"int64 to name 2147483649 rows.*\.long"):
            prefixcore.soft_embedding(torch.arange(3, dtype=torch.int32), table, rows)
    ids = torch.tensor([2**31 - 2, 2**31 - 1, 2**31])
    assert torch.equal(prefixcore.soft_embedding(ids, table, rows)[1:], rows)
