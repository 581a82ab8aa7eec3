"""Soft prompts as plain embeddings: what stands in the files, the model's outputs, and files that are none."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import prefixcore
from prefixcore.adapters import AdapterError, read_adapter
from prefixcore.adapters.formats.files import save_torch

from .conftest import P, make_adapter
from .outputs import behind_embeddings, with_adapter


def as_others_read_it(name: str, path: Path) -> torch.Tensor:
    """By the calls with which vLLM, TensorRT-LLM, llama.cpp's users and the gguf package read it."""
    if name == "vllm":
        return torch.load(io.BytesIO(path.read_bytes()), weights_only=True, map_location="cpu")
    if name == "tensorrt-llm":
        return torch.from_numpy(np.load(path))[0]
    if name == "llama.cpp":
        return torch.from_numpy(np.fromfile(path, dtype=np.float32).reshape(-1, 32).copy())
    (tensor,) = gguf.GGUFReader(path).tensors
    assert tensor.name == "prompt_embeddings"
    return torch.from_numpy(tensor.data.copy())


@pytest.mark.parametrize("name", ["vllm", "tensorrt-llm", "llama.cpp", "gguf"])
def test_what_others_read_gives_the_adapters_outputs(
    name: str, prompt: Path, model: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    prefixcore.export_adapter(prompt, name, tmp_path / "theirs")
    embeddings = as_others_read_it(name, tmp_path / "theirs")
    assert torch.equal(embeddings, read_adapter(prompt).tensors)
    expected = with_adapter(model, prompt, ids)
    torch.testing.assert_close(behind_embeddings(model, embeddings, ids), expected, atol=1e-5, rtol=0)


def test_a_table_of_several_tasks(prompt: Path, model: Any, tmp_path: Path) -> None:
    config = prefixcore.MultitaskPromptTuningConfig(num_virtual_tokens=P, num_tasks=2, num_ranks=2)
    make_adapter(model, config, tmp_path / "tasks")
    with prefixcore.load(model, tmp_path / "tasks") as handle:
        prompts = handle.bake()
    prefixcore.export_adapter([prompt, tmp_path / "tasks"], "tensorrt-llm", tmp_path / "table.npy")
    table = torch.from_numpy(np.load(tmp_path / "table.npy"))
    assert table.shape == (3, P, 32)
    assert torch.equal(table, torch.cat((read_adapter(prompt).tensors[None], prompts)))
    with pytest.raises(AdapterError, match="3 tasks and an adapter is for one: say which, task_id=0 to 2"):
        prefixcore.import_adapter(tmp_path / "table.npy", "tensorrt-llm", tmp_path / "x", model=model)
    folder = prefixcore.import_adapter(tmp_path / "table.npy", "tensorrt-llm", tmp_path / "x", model=model, task_id=2)
    assert torch.equal(read_adapter(folder).tensors, prompts[1])
    with pytest.raises(AdapterError, match="task_id is 3, but its tasks are 0 to 2"):
        prefixcore.import_adapter(tmp_path / "table.npy", "tensorrt-llm", tmp_path / "y", model=model, task_id=3)
    with pytest.raises(AdapterError, match="holds the soft prompt of one task, but there are 2"):
        prefixcore.export_adapter(tmp_path / "tasks", "vllm", tmp_path / "y")
    with pytest.raises(AdapterError, match="holds one adapter, got 2"):
        prefixcore.export_adapter([prompt, prompt], "vllm", tmp_path / "y")
    make_adapter(model, prefixcore.PromptTuningConfig(num_virtual_tokens=2), tmp_path / "short")
    with pytest.raises(AdapterError, match="tasks of a prompt table have one shape"):
        prefixcore.export_adapter([prompt, tmp_path / "short"], "tensorrt-llm", tmp_path / "y")


def npy(array: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


HUGE = npy(np.zeros((1, 1, 32), np.float32)).replace(b"(1, 1, 32)", b"(9, 9, 32)")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("vllm", save_torch(torch.randn(4, 33)), "have 33 numbers, but the model's embeddings have 32"),
        ("vllm", save_torch(torch.randn(32)), "expected shape"),
        ("vllm", save_torch(torch.randn(2, 4, 32)), "expected shape"),
        ("vllm", save_torch(torch.ones(4, 32, dtype=torch.int32)), "floating-point numbers, got torch.int32"),
        ("vllm", save_torch(torch.eye(32).to_sparse()), "floating-point numbers"),
        ("vllm", save_torch(torch.full((4, 32), torch.inf)), "NaN or infinite"),
        ("vllm", save_torch([torch.randn(4, 32)]), "expected a tensor, got list"),
        ("vllm", save_torch(Path("x")), "needs unpickling"),
        ("vllm", save_torch(torch.ones(1).expand(2**31, 32)), "claims .* numbers, but holds 1"),
        ("vllm", b"nothing", "not a file of torch.save"),
        ("tensorrt-llm", b"nothing", "not a .npy file"),
        ("tensorrt-llm", npy(np.array([{"a": 1}], dtype=object)), "Python objects, which need unpickling"),
        ("tensorrt-llm", npy(np.zeros((1, 4, 32), np.int8)), "float16, float32 or float64, got int8"),
        ("tensorrt-llm", npy(np.zeros((1, 4, 32), np.complex64)), "got complex64"),
        ("tensorrt-llm", npy(np.zeros((1, 4, 31), np.float32)), "have 31 numbers, but the model's embeddings have 32"),
        ("tensorrt-llm", npy(np.zeros((1, 4, 32), np.float32))[:-4], "does not fit"),
        ("tensorrt-llm", HUGE, "does not fit the 128 bytes"),
        ("tensorrt-llm", npy(np.full((1, 4, 32), np.nan, np.float32)), "NaN or infinite"),
        ("tensorrt-llm", npy(np.zeros((0, 4, 32), np.float32)), "holds no numbers"),
        ("llama.cpp", b"\0" * 128, "raw numbers say neither how many virtual tokens"),
        ("gguf", b"nothing", "not a GGUF file"),
        ("gguf", b"GGUF" + b"\xff" * 60, "not a whole GGUF file"),
    ],
)
def test_what_does_not_fit_is_named(name: str, data: bytes, message: str, model: Any, tmp_path: Path) -> None:
    (tmp_path / "theirs").write_bytes(data)
    with pytest.raises(AdapterError, match=message):
        prefixcore.import_adapter(tmp_path / "theirs", name, tmp_path / "x", model=model)
    assert not (tmp_path / "x").exists()


def test_a_gguf_file_that_is_cut_off_or_holds_something_else(prompt: Path, model: Any, tmp_path: Path) -> None:
    prefixcore.export_adapter(prompt, "gguf", tmp_path / "p.gguf")
    whole = (tmp_path / "p.gguf").read_bytes()
    for end in (5, 40, len(whole) // 2, len(whole) - 300):
        (tmp_path / "cut.gguf").write_bytes(whole[:end])
        with pytest.raises(AdapterError, match="not a whole GGUF file"):
            prefixcore.import_adapter(tmp_path / "cut.gguf", "gguf", tmp_path / "x", model=model)
    (tmp_path / "other.gguf").write_bytes(whole.replace(b"prompt_embeddings", b"another_tensor_xy"))
    with pytest.raises(AdapterError, match="prompt_embeddings: missing"):
        prefixcore.import_adapter(tmp_path / "other.gguf", "gguf", tmp_path / "x", model=model)


def test_numbers_too_large_for_a_half_are_refused(model: Any, tmp_path: Path) -> None:
    config = prefixcore.PromptTuningConfig(init=torch.full((2, 32), 1e6))
    with prefixcore.attach(model, config) as handle:
        handle.save(tmp_path / "large")
    with pytest.raises(AdapterError, match="too large for float16; write float32"):
        prefixcore.export_adapter(tmp_path / "large", "vllm", tmp_path / "x", dtype=torch.float16)


def test_prompts_in_the_text_lose_their_place_by_name(model: Any, tmp_path: Path) -> None:
    config = prefixcore.PromptTuningConfig(num_virtual_tokens=2, virtual_token_ids=[90, 91])
    make_adapter(model, config, tmp_path / "placed")
    lost = prefixcore.export_adapter(tmp_path / "placed", "vllm", tmp_path / "p.pt")
    assert "where in the text the virtual tokens stand (virtual_token_ids)" in lost
    with pytest.raises(AdapterError, match="PEFT cannot hold it"):
        prefixcore.export_adapter(tmp_path / "placed", "peft", tmp_path / "x")
