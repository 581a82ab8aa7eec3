"""The registry as a server sees it: each adapter as it is at the moment of the request."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import prefixcore
from prefixcore.adapters import AdapterError, adapter_digest
from prefixcore.serving import catalog as catalog_module
from prefixcore.serving.before_start import describe_model
from prefixcore.serving.catalog import Catalog
from prefixcore.serving.served_model import ServedModel
from tests import tiny
from tests.hf import tiny_models

from . import registry as helper
from . import shelf


def test_an_adapter_comes_is_replaced_and_goes(tmp_path: Path) -> None:
    model, registry, served = helper.make(tmp_path)
    catalog = Catalog(registry, served)
    with pytest.raises(AdapterError, match=r"no adapter is named 'capitals'; there are none"):
        catalog.look_up("capitals", "0" * 64)
    old = helper.add(registry, "capitals", model, 5)
    assert catalog.look_up("capitals", old).num_virtual_tokens == 5
    new = helper.add(registry, "capitals", model, 7)
    assert catalog.look_up("capitals", new).num_virtual_tokens == 7
    with pytest.raises(AdapterError, match="was replaced or altered"):
        catalog.look_up("capitals", old)
    shutil.rmtree(registry / "capitals")
    with pytest.raises(AdapterError, match="no adapter is named"):
        catalog.look_up("capitals", new)


def test_a_folder_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, registry, served = helper.make(tmp_path)
    digest = helper.add(registry, "capitals", model)
    catalog = Catalog(registry, served)
    catalog.look_up("capitals", digest)
    catalog.find("capitals")
    for reader in ("read_header", "read"):
        monkeypatch.setattr(catalog_module, reader, None)
    assert catalog.look_up("capitals", digest).num_virtual_tokens == 5
    assert catalog.find("capitals").digest == digest


def test_the_numbers_are_read_for_the_front_alone(tmp_path: Path) -> None:
    """The scheduler does not wait for a disk; a prefix that is damaged in its numbers fails where it is loaded."""
    model, registry, served = helper.make(tmp_path)
    digest = helper.add(registry, "capitals", model)
    shelf.damage(registry / "capitals")
    catalog = Catalog(registry, served)
    assert catalog.look_up("capitals", digest).digest == digest
    with pytest.raises(AdapterError, match="SHA-256"):
        catalog.find("capitals")
    with pytest.raises(AdapterError, match="SHA-256"):  # known to be damaged, it is admitted no more
        catalog.look_up("capitals", digest)
    assert list(catalog.problems()) == ["capitals"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "../adapters/capitals", "a/b", "a\\b", "a\0b", "x" * 5000, "\ud800", 7]
)
def test_names_of_nothing(tmp_path: Path, name: Any) -> None:
    model, registry, served = helper.make(tmp_path)
    helper.add(registry, "capitals", model)
    catalog = Catalog(registry, served)
    assert not catalog.holds(name)
    with pytest.raises(AdapterError, match="no adapter is named"):
        catalog.find(name)


def test_many_threads_read_what_has_changed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, registry, served = helper.make(tmp_path)
    digest = helper.add(registry, "capitals", model)
    catalog, reads, read = Catalog(registry, served), [], catalog_module.read
    catalog.look_up("capitals", digest)

    def slowly(*arguments: Any, **options: Any) -> Any:
        reads.append(arguments)
        time.sleep(0.05)
        return read(*arguments, **options)

    monkeypatch.setattr(catalog_module, "read", slowly)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(catalog.find, ["capitals"] * 8))
    assert {each.digest for each in found} == {digest}
    assert len(reads) == 1


def test_a_registry_that_is_gone(tmp_path: Path) -> None:
    _, registry, served = helper.make(tmp_path)
    catalog = Catalog(registry, served)
    registry.rmdir()
    assert catalog.served() == []
    assert catalog.problems() == {}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "prefixcore_manifest.json"])
def test_a_file_that_is_cut(tmp_path: Path, name: str) -> None:
    model, registry, served = helper.make(tmp_path)
    digest = helper.add(registry, "capitals", model)
    catalog = Catalog(registry, served)
    catalog.look_up("capitals", digest)
    file = registry / "capitals" / name
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(AdapterError, match="capitals"):
        catalog.look_up("capitals", digest)


def test_soft_prompts_and_prefixes_of_some_layers_are_refused(tmp_path: Path) -> None:
    model, registry, served = helper.make(tmp_path)
    catalog = Catalog(registry, served)
    with prefixcore.attach(model, prefixcore.PromptTuningConfig(num_virtual_tokens=4, init="random")) as handle:
        handle.save(registry / "soft")
    with pytest.raises(AdapterError, match="prefixcore bake"):
        catalog.look_up("soft", adapter_digest(registry / "soft"))
    some = helper.add(registry, "some", model, layers=[1])
    with pytest.raises(AdapterError, match=r"for the layers \[1\], and the model has 2"):
        catalog.look_up("some", some)


def test_other_weights_are_noticed_in_the_checkpoint(tmp_path: Path) -> None:
    model, registry, served = helper.make(tmp_path)
    other = tiny.model()
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    catalog = Catalog(registry, served)
    foreign = helper.add(registry, "foreign", other)
    with pytest.raises(AdapterError, match="other weights than the one the adapter was trained for"):
        catalog.look_up("foreign", foreign)
    assert catalog.look_up("own", helper.add(registry, "own", model)).num_virtual_tokens == 5


def test_the_checkpoint_may_have_another_dtype_and_several_files(tmp_path: Path) -> None:
    model, registry, _ = helper.make(tmp_path)
    digest = helper.add(registry, "capitals", model)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "halves", max_shard_size="40KB")
    assert len(list((tmp_path / "halves").glob("*.safetensors"))) > 1
    served = ServedModel.describe(model.config, helper.SHAPES, tmp_path / "halves")
    assert served.checkpoint is not None
    assert Catalog(registry, served).look_up("capitals", digest).num_virtual_tokens == 5


def test_names_that_differ_by_the_decoder(tmp_path: Path) -> None:
    model, registry, _ = helper.make(tmp_path)
    digest = helper.add(registry, "capitals", model)
    folder = tmp_path / "model"
    tensors = load_file(folder / "model.safetensors")
    save_file({f"language_model.{name}": x for name, x in tensors.items()}, folder / "model.safetensors")
    served = ServedModel.describe(model.config, helper.SHAPES, folder)
    compared = served.compare({"samples": {}, **_manifest(registry / "capitals")})
    assert not compared.differences
    assert not compared.unchecked
    assert Catalog(registry, served).look_up("capitals", digest).num_virtual_tokens == 5


@pytest.mark.parametrize(
    "name", ["Gemma3", "Idefics3", "InternVL", "LlavaNext", "Llava", "Mistral3", "Qwen2_5_VL", "Qwen3VL", "SmolVLM"]
)
def test_a_model_that_reads_images_is_known_by_its_whole_class_and_by_its_weights(name: str, tmp_path: Path) -> None:
    class_name = f"{name}ForConditionalGeneration"
    for seed in (0, 1):
        model = tiny_models.make(class_name, tiny_models.every_class()[class_name], seed=seed)
        with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=5, init="random")) as handle:
            handle.save(tmp_path / "adapters" / f"of-{seed}")
        model.save_pretrained(tmp_path / f"model-{seed}")
    served = describe_model(str(tmp_path / "model-0"))
    assert not served.compare(_manifest(tmp_path / "adapters" / "of-0")).unchecked
    catalog = Catalog(tmp_path / "adapters", served)
    assert [each.name for each in catalog.served()] == ["of-0"]
    assert "weights" in catalog.problems()["of-1"]


def test_without_a_checkpoint_the_architecture_decides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, registry, _ = helper.make(tmp_path)
    served = ServedModel.describe(model.config, helper.SHAPES, None)
    assert "checked by its architecture alone" in caplog.text
    assert Catalog(registry, served).look_up("a", helper.add(registry, "a", model)).num_virtual_tokens == 5
    model.config.architectures = ["QwenForCausalLM"]
    served = ServedModel.describe(model.config, helper.SHAPES, None)
    with pytest.raises(AdapterError, match=r"base_model\.class"):
        Catalog(registry, served).look_up("a", adapter_digest(registry / "a"))


def test_a_folder_of_peft_alone(tmp_path: Path) -> None:
    """Has no fingerprint: its shapes decide."""
    model, registry, served = helper.make(tmp_path)
    helper.add(registry, "capitals", model)
    os.remove(registry / "capitals" / "prefixcore_manifest.json")
    assert Catalog(registry, served).look_up("capitals", adapter_digest(registry / "capitals")).num_virtual_tokens == 5


def _manifest(folder: Path) -> dict[str, object]:
    manifest = prefixcore.adapters.read_adapter(folder).manifest
    assert manifest is not None
    return manifest.base_model
