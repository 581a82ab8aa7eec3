"""An adapter is written whole or not at all, and nothing but an adapter is replaced."""

from __future__ import annotations

import dataclasses
import os
import stat
import warnings
from pathlib import Path

import pytest
import torch

from prefixcore.adapters import AdapterError, Manifest, read_adapter, read_record, replace, write_adapter
from prefixcore.adapters.tensors import is_finite
from prefixcore.nn import LayerShape, PrefixTuningConfig, PromptTuningConfig

from .models import CONFIGS, SHAPES, UNEVEN, contents, make_module, same, save

LLAMA = SHAPES["llama"]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_what_is_read(name, llama, tmp_path):
    module = save(tmp_path / "deep" / "er", name, llama, LLAMA, task="say hello")
    adapter = read_adapter(tmp_path / "deep" / "er")
    assert same(adapter.tensors, module.bake())
    assert adapter.config.to_dict() == {**CONFIGS[name].to_dict(), "num_virtual_tokens": 5}
    assert adapter.manifest.task == "say hello"
    assert adapter.manifest.method == CONFIGS[name].method
    assert adapter.manifest.base_model["class"] == "LlamaForCausalLM"
    assert adapter.manifest.libraries["torch"] == torch.__version__


@pytest.mark.parametrize("layers", [None, [0, 2]])
@pytest.mark.parametrize("shapes", [UNEVEN, [LayerShape(2, 8, 4)] * 2, LLAMA])
def test_what_peft_cannot_express_gets_our_own_names(shapes, layers, llama, tmp_path):
    config = PrefixTuningConfig(5, init="random", layers=layers)
    module = make_module(config, shapes)
    manifest = Manifest.create(llama, config, shapes)
    write_adapter(tmp_path, module=module, config=config, manifest=manifest)
    assert (tmp_path / "adapter_config.json").exists() == (layers is None and shapes is LLAMA)
    adapter = read_adapter(tmp_path)
    assert same(adapter.tensors, module.bake())
    assert adapter.layers == (layers or [0, 1])
    assert adapter.layer_shapes == list(shapes)


def test_a_prefix_in_fewer_layers_than_the_model_has_is_not_for_peft(llama, tmp_path):
    save(tmp_path, "prefix", llama, LLAMA[:1])  # a model whose other layer has no attention
    assert not (tmp_path / "adapter_config.json").exists()
    assert read_adapter(tmp_path).layers == [0]


def test_a_second_write_replaces_and_leaves_no_trace(llama, tmp_path):
    target = tmp_path / "adapter"
    save(target, "prefix-mlp", llama, LLAMA)
    (target / "README.md").write_text("mine")
    module = save(target, "prompt", llama, LLAMA)
    assert same(read_adapter(target).tensors, module.bake())
    assert sorted(contents(target)) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "prefixcore_manifest.json",
    ]
    assert (target / "README.md").read_text() == "mine"
    assert os.listdir(tmp_path) == ["adapter"]


def test_permissions_are_the_users(llama, tmp_path):
    before = os.umask(0o027)
    try:
        save(tmp_path / "adapter", "prefix", llama, LLAMA)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "adapter").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "adapter" / "adapter_config.json").stat().st_mode) == 0o640


def test_a_relative_folder_and_the_working_directory(llama, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = CONFIGS["prompt"]
    manifest = Manifest.create(llama, config)
    written = write_adapter("sub", module=make_module(config, []), config=config, manifest=manifest)
    assert written == tmp_path / "here" / "sub"
    assert read_adapter("sub").manifest is not None


def _others(path: Path) -> dict[str, Path]:
    """Things that are no adapter."""
    made = {name: path / name for name in ("notes", "lora", "garbage", "nested", "file", "link")}
    for name in ("notes", "lora", "garbage", "nested"):
        made[name].mkdir()
    (made["notes"] / "notes.txt").write_text("dear diary")
    (made["lora"] / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (made["garbage"] / "adapter_config.json").write_text("{")
    (made["nested"] / "prefixcore_manifest.json").write_text("{}")
    (made["nested"] / "checkpoints").mkdir()
    made["file"].write_text("a file")
    (path / "elsewhere").mkdir()
    made["link"].symlink_to(path / "elsewhere")
    return made


@pytest.mark.parametrize("name", ["notes", "lora", "garbage", "nested", "file", "link"])
def test_nothing_else_is_replaced(name, llama, tmp_path):
    target = _others(tmp_path)[name]
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(AdapterError, match=str(target)):
        save(target, "prefix", llama, LLAMA)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_links_beside_an_adapter_stay_links(llama, tmp_path):
    target = tmp_path / "adapter"
    save(target, "prefix", llama, LLAMA)
    (tmp_path / "big").write_text("data")
    (target / "link").symlink_to(tmp_path / "big")
    save(target, "prefix", llama, LLAMA)
    assert (target / "link").is_symlink()


@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_at_any_step_leaves_all_as_it_was(existing, llama, tmp_path, monkeypatch):
    target = tmp_path / "adapter"
    if existing:
        save(target, "prefix", llama, LLAMA)
        (target / "README.md").write_text("mine")
    before = contents(target) if existing else None

    steps = []
    fail_at = None

    def counted(name, real):
        def call(*args, **kwargs):
            steps.append(name)
            if len(steps) - 1 == fail_at:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", counted("fsync", os.fsync))
    monkeypatch.setattr(Path, "rename", counted("rename", Path.rename))
    monkeypatch.setattr(Path, "mkdir", counted("mkdir", Path.mkdir))
    monkeypatch.setattr("shutil.copy2", counted("copy", __import__("shutil").copy2))
    monkeypatch.setattr(replace, "exchange", counted("exchange", replace.exchange))
    fail_at = 0
    while True:
        steps.clear()
        try:
            save(target, "prompt", llama, LLAMA)
        except OSError:
            # The last fsync is after everything is in place.
            if steps[-2:] == ["exchange" if existing else "rename", "fsync"]:
                break
            assert os.listdir(tmp_path) == (["adapter"] if existing else [])
            assert before is None or contents(target) == before
        else:
            raise AssertionError("every step was tried and the last one did not come")
        fail_at += 1
    assert fail_at >= 6
    assert read_adapter(target).manifest.method == "prompt"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_one_number_among_many_that_is_not_finite_is_found(number, dtype):
    tensor = torch.randn(131).to(dtype)  # no multiple of what a processor compares at once
    assert is_finite(tensor)
    assert is_finite(tensor[:0])
    for place in range(len(tensor)):
        broken = tensor.clone()
        broken[place] = number
        assert not is_finite(broken)


def test_what_is_trained_is_looked_at_without_a_warning():
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else torch warns once a process of a number that has a gradient
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert is_finite(torch.ones(3, requires_grad=True))
    finally:
        torch.set_warn_always(always)


@pytest.mark.parametrize("name", ["prefix", "prefix-basis", "p-tuning-lstm"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_diverged_training_is_not_written(name, number, llama, tmp_path):
    config = CONFIGS[name]
    module = make_module(config, LLAMA)
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] = number
    manifest = Manifest.create(llama, config, LLAMA if name.startswith("prefix") else None)
    with pytest.raises(AdapterError, match="NaN or infinite"):
        write_adapter(tmp_path / "adapter", module=module, config=config, manifest=manifest)
    assert os.listdir(tmp_path) == []


def test_parts_that_do_not_fit_each_other(llama, tmp_path):
    prefix = CONFIGS["prefix"]
    module = make_module(prefix, LLAMA)
    manifest = Manifest.create(llama, prefix, LLAMA)
    prompt = CONFIGS["prompt"]
    for options, message in [
        ({"config": prompt}, "method: the manifest says 'prefix', the configuration 'prompt'"),
        ({"module": make_module(prompt, [])}, "the module is a SoftPrompt"),
        ({"config": CONFIGS["prefix-mlp"]}, "not built with this configuration"),
        ({"config": PrefixTuningConfig(6, init="random")}, "6, but the module has 5"),
        ({"manifest": Manifest.create(llama, prefix, LLAMA[:1])}, "layer_shapes"),
        ({"manifest": Manifest.create(llama, prompt)}, "the manifest says 'prompt'"),
    ]:
        parts = {"module": module, "config": prefix, "manifest": manifest, **options}
        with pytest.raises(AdapterError, match=message):
            write_adapter(tmp_path / "adapter", **parts)
    assert os.listdir(tmp_path) == []


def test_manifest_wants_shapes_for_a_prefix_alone(llama):
    with pytest.raises(ValueError, match="expected for a prefix"):
        Manifest.create(llama, CONFIGS["prefix"])
    with pytest.raises(ValueError, match="nothing else"):
        Manifest.create(llama, PromptTuningConfig(2), LLAMA)
    with pytest.raises(ValueError, match=r"layers \[0, 3\], got 1"):
        Manifest.create(llama, PrefixTuningConfig(2, layers=[0, 3]), LLAMA[:1])


def test_manifest_describes_the_tokenizer_and_survives_json(llama):
    from tests import tiny

    manifest = Manifest.create(llama, CONFIGS["prompt"], tokenizer=tiny.tokenizer())
    assert manifest.tokenizer["vocab_size"] == len(tiny.CHARACTERS) + 2
    assert Manifest.from_dict(manifest.to_dict()) == dataclasses.replace(manifest)


class _NoTokenizer:
    """Nothing but a name, and that not a string."""

    name_or_path = Path("somewhere")


def test_a_strange_tokenizer_is_no_reason_to_lose_a_training(llama, tmp_path):
    manifest = Manifest.create(llama, CONFIGS["prompt"], tokenizer=_NoTokenizer())
    write_adapter(
        tmp_path / "a", module=make_module(CONFIGS["prompt"], []), config=CONFIGS["prompt"], manifest=manifest
    )
    described = read_adapter(tmp_path / "a").manifest.tokenizer
    assert described == {"class": "_NoTokenizer", "name_or_path": "somewhere", "vocab_size": None}


def test_a_task_is_a_text(llama):
    with pytest.raises(TypeError, match="task: expected a text or None, got int"):
        Manifest.create(llama, CONFIGS["prompt"], task=5)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"notes": {1}}, "record: notes: expected what JSON can hold"),
        ({"notes": "x" * 2**22}, "record: expected at most"),
    ],
)
def test_a_record_that_could_not_be_read_is_not_written(record, expected, llama, tmp_path):
    config = CONFIGS["prefix"]
    manifest = Manifest.create(llama, config, LLAMA)
    module = make_module(config, LLAMA)
    with pytest.raises(AdapterError, match=expected):
        write_adapter(tmp_path / "a", module=module, config=config, manifest=manifest, record=record)
    assert list(tmp_path.iterdir()) == []


def test_no_folder_has_no_record_that_is_empty(tmp_path):
    with pytest.raises(AdapterError, match="nowhere: no such folder"):
        read_record(tmp_path / "nowhere")


@pytest.mark.parametrize("task", ["", " \n"])
def test_a_task_that_says_nothing(task, llama):
    with pytest.raises(AdapterError, match="task: expected what it does, in words, or None"):
        Manifest.create(llama, CONFIGS["prompt"], task=task)


def test_where_nothing_can_be_written(llama):
    with pytest.raises(OSError, match=r"the adapter cannot be written \(.+\); give a folder.*'/proc/x'"):
        save(Path("/proc/x"), "prompt", llama, LLAMA)
