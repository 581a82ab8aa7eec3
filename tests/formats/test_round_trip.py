"""Every format there and back: the numbers, the outputs, what is said to be lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import prefixcore
from prefixcore.adapters import AdapterError, read_adapter, read_record
from prefixcore.adapters.formats import FORMATS, PREFIX, PROMPT

from .conftest import make_adapter
from .outputs import with_adapter

ONE_WAY = ("adapters", "llama.cpp")
"""Its own tests have a model whose heads it has a word for; raw numbers are never read."""

CASES = [(name, kind) for name, each in FORMATS.items() for kind in each.kinds if name not in ONE_WAY]


def tensors(folder: Path) -> list[torch.Tensor]:
    found = read_adapter(folder).tensors
    return [found] if isinstance(found, torch.Tensor) else [tensor for pair in found for tensor in pair]


@pytest.fixture
def source(request: pytest.FixtureRequest, kind: str) -> Path:
    return request.getfixturevalue("prefix" if kind == PREFIX else "prompt")


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_there_and_back(name: str, kind: str, source: Path, model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    lost = prefixcore.export_adapter(source, name, tmp_path / "theirs")
    kept = "" if name == "peft" else "base model, "
    assert lost == [f"manifest (task, {kept}provenance)"]
    assert (tmp_path / "theirs").is_dir() == FORMATS[name].is_folder
    folder = prefixcore.import_adapter(tmp_path / "theirs", name, tmp_path / "back", model=model, task="x -> y")
    assert all(torch.equal(a, b) for a, b in zip(tensors(source), tensors(folder), strict=True))
    assert torch.equal(with_adapter(model, source, ids), with_adapter(model, folder, ids))
    adapter = read_adapter(folder)
    assert adapter.manifest is not None
    assert adapter.manifest.task == "x -> y"
    record = read_record(folder)["converted_from"]
    assert (record["format"], len(record["sha256"])) == (name, 64)
    if name in ("peft", "cartridges") and kind == PREFIX:
        assert getattr(adapter.config, "num_frozen_tokens", None) == 1


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n, k in CASES if n != "peft"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(name: str, kind: str, dtype: torch.dtype, source: Path, model: Any, tmp_path: Path) -> None:
    if dtype == torch.bfloat16 and name in ("tensorrt-llm", "gguf"):
        with pytest.raises(AdapterError, match="float32 or float16"):
            prefixcore.export_adapter(source, name, tmp_path / "theirs", dtype=dtype)
        return
    prefixcore.export_adapter(source, name, tmp_path / "theirs", dtype=dtype)
    folder = prefixcore.import_adapter(tmp_path / "theirs", name, tmp_path / "back", model=model)
    for before, after in zip(tensors(source), tensors(folder), strict=True):
        assert torch.equal(before.to(dtype).float(), after)


@pytest.mark.parametrize("name", FORMATS)
def test_the_other_kind_is_refused_with_a_way_out(name: str, prefix: Path, prompt: Path, model: Any, tmp_path: Path):
    kinds = FORMATS[name].kinds
    if PROMPT not in kinds:
        with pytest.raises(AdapterError, match=r"holds a prefix, and this is a soft prompt: bake it first"):
            prefixcore.export_adapter(prompt, name, tmp_path / "theirs", model=model)
    if PREFIX not in kinds:
        with pytest.raises(AdapterError, match=r"holds a soft prompt, and this is a prefix: .* no embeddings"):
            prefixcore.export_adapter(prefix, name, tmp_path / "theirs", model=model)
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("name", ["peft", "cartridges", "lmcache"])
def test_a_prefix_in_some_layers_alone_has_no_place(name: str, model: Any, tmp_path: Path) -> None:
    make_adapter(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=3, layers=[1]), tmp_path / "some")
    with pytest.raises(AdapterError, match="some layers alone|layers \\[1\\] alone"):
        prefixcore.export_adapter(tmp_path / "some", name, tmp_path / "theirs")


def test_what_is_there_is_never_replaced(prompt: Path, model: Any, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(AdapterError, match="is there already"):
        prefixcore.export_adapter(prompt, "vllm", tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"
    prefixcore.export_adapter(prompt, "vllm", tmp_path / "p.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "todo.txt").write_text("mine")
    with pytest.raises(AdapterError, match=r"todo\.txt"):
        prefixcore.import_adapter(tmp_path / "p.pt", "vllm", tmp_path / "out", model=model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "out", "p.pt"]


def test_heads_that_are_left_out_are_named(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    options = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
               "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "num_labels": 3}  # fmt: skip
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**options)).eval()
    config = prefixcore.PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS")
    make_adapter(model, config, tmp_path / "classifier")
    lost = prefixcore.export_adapter(tmp_path / "classifier", "vllm", tmp_path / "p.pt")
    assert any("heads that were trained along" in each for each in lost)
    assert all(
        "heads" not in each for each in prefixcore.export_adapter(tmp_path / "classifier", "peft", tmp_path / "peft")
    )


def test_another_model_is_refused(prefix: Path, prompt: Path, tmp_path: Path) -> None:
    from tests.hf.models import make

    other = make("llama", hidden_size=48, num_hidden_layers=3)
    for name, kind in CASES:
        if name == "peft":
            continue
        theirs = tmp_path / f"{name}-{kind}"
        prefixcore.export_adapter(prefix if kind == PREFIX else prompt, name, theirs)
        with pytest.raises(AdapterError, match="model|shape|rows of"):
            prefixcore.import_adapter(theirs, name, tmp_path / "back", model=other)
    assert not (tmp_path / "back").exists()


def test_an_unknown_format_is_named(prompt: Path, model: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="expected one of peft, cartridges, .* got 'onnx'"):
        prefixcore.export_adapter(prompt, "onnx", tmp_path / "x")
    with pytest.raises(AdapterError, match="got 'onnx'"):
        prefixcore.import_adapter(prompt, "onnx", tmp_path / "x", model=model)
