"""Soft prompts that are served: baked once beside the registry, which stays as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import prefixcore as package
from prefixcore.adapters import AdapterError, Registry, adapter_digest, read_adapter
from prefixcore.serving.baked import bake_registry
from prefixcore.serving.before_start import describe_model
from prefixcore.serving.catalog import Catalog
from prefixcore.serving.settings import Settings
from tests import tiny
from tests.cli.fixtures import prefixcore
from tests.serving import shelf
from tests.serving.test_launch import fake_python

__all__ = ["fake_python", "prefixcore"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model, and a registry of a prefix and a soft prompt."""
    tiny.folder(tmp_path / "model")
    shelf.write(tmp_path / "adapters" / "capitals", seed=1, tokens=3)
    shelf.soft_prompt(tmp_path / "adapters" / "asked", 4, seed=2)
    return tmp_path


def bake(place: Path, model: Any = None) -> dict[str, str]:
    return bake_registry(Registry(place / "adapters"), place / "baked", lambda: model or tiny.model())


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_what_is_served_is_equal_to_what_was_baked(place: Path) -> None:
    assert bake(place) == {}
    original = adapter_digest(place / "adapters" / "asked")
    catalog = Catalog(place / "adapters", describe_model(str(place / "model")), place / "baked")
    assert [served.name for served in catalog.served()] == ["asked", "capitals"]
    served = catalog.find("asked")
    assert (served.num_virtual_tokens, served.task, served.baked_from) == (4, "asked 2", original)
    assert catalog.look_up("asked", served.digest) == served
    assert catalog.find("capitals").baked_from is None
    ids = torch.tensor([[5, 6, 7]])
    logits = []
    for folder in (place / "adapters" / "asked", served.folder):
        model = tiny.model()
        with package.load(model, folder), torch.no_grad():
            logits.append(model(input_ids=ids).logits[:, -3:])
    assert torch.allclose(*logits, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(logits[0], tiny.model()(input_ids=ids).logits, atol=0.1)


def test_nothing_is_baked_twice_and_the_registry_is_only_read(place: Path) -> None:
    before = contents(place / "adapters")
    bake(place)
    baked = contents(place / "baked")

    def no_model() -> Any:
        raise AssertionError("it is baked")

    assert bake_registry(Registry(place / "adapters"), place / "baked", no_model) == {}
    assert contents(place / "baked") == baked
    assert contents(place / "adapters") == before


def test_a_prefix_that_is_damaged_is_refused_and_baked_again(place: Path) -> None:
    bake(place)
    digest = adapter_digest(place / "adapters" / "asked")
    shelf.damage(place / "baked" / digest)
    with pytest.raises(AdapterError, match="SHA-256"):
        Catalog(place / "adapters", None, place / "baked").find("asked")
    bake(place)
    assert Catalog(place / "adapters", None, place / "baked").find("asked").baked_from == digest


def test_another_soft_prompt_never_meets_the_prefix_of_the_former_one(place: Path) -> None:
    bake(place)
    catalog = Catalog(place / "adapters", None, place / "baked")
    old = catalog.find("asked")
    shutil.rmtree(place / "adapters" / "asked")
    shelf.soft_prompt(place / "adapters" / "asked", 4, seed=3)
    with pytest.raises(AdapterError, match="serve --bake"):
        catalog.look_up("asked", old.digest)
    bake(place)  # by another start: the server that runs sees it
    new = catalog.find("asked")
    assert new.digest != old.digest
    with pytest.raises(AdapterError, match="was replaced"):
        catalog.look_up("asked", old.digest)


def test_a_prefix_of_something_else_stands_in_for_nothing(place: Path) -> None:
    """Whatever lies there under the digest, only what was baked from it is served."""
    digest = adapter_digest(place / "adapters" / "asked")
    shelf.write(place / "baked" / digest, seed=9)
    with pytest.raises(AdapterError, match="serve --bake"):
        Catalog(place / "adapters", None, place / "baked").find("asked")
    bake(place)
    assert Catalog(place / "adapters", None, place / "baked").find("asked").baked_from == digest


def test_what_cannot_be_baked_is_said_and_the_rest_is_baked(place: Path) -> None:
    config = package.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, init="random")
    with package.attach(tiny.model(), config) as handle:
        handle.save(place / "adapters" / "several")
    problems = bake(place)
    assert list(problems) == ["several"]
    assert "say which, task_id=0 to 1" in problems["several"]
    assert Catalog(place / "adapters", None, place / "baked").find("asked").num_virtual_tokens == 4


def test_of_another_model(place: Path) -> None:
    problems = bake(place, tiny.model(seed=1))
    assert "other weights" in problems["asked"]
    assert not any((place / "baked").iterdir())


@pytest.mark.parametrize("inside", ["adapters", "adapters/baked"])
def test_the_registry_is_no_place_for_them(place: Path, inside: str) -> None:
    with pytest.raises(AdapterError, match="lies in the registry"):
        bake_registry(Registry(place / "adapters"), place / inside, tiny.model)


def test_the_connector_is_told(place: Path) -> None:
    with pytest.raises(ValueError, match=r"kv_connector_extra_config\.baked: expected a folder"):
        Settings.parse({"adapters": str(place / "adapters"), "baked": str(place / "nowhere")})


# -- the command line


def serve(prefixcore: Any, place: Path, python: str, *options: object) -> Any:
    named = ("--model", place / "model", "--adapters", place / "adapters", "--python", python)
    return prefixcore("serve", *named, "--dry-run", *options)


def test_serve_bakes_once(prefixcore: Any, place: Path, fake_python: str) -> None:
    code, _, err = serve(prefixcore, place, fake_python)
    assert code == 2
    assert f"prefixcore bake {place / 'adapters' / 'asked'} --model MODEL" in err
    assert "prefixcore serve --bake" in err
    before = contents(place / "adapters")
    code, out, err = serve(prefixcore, place, fake_python, "--bake", "--", "--dtype", "float32")
    assert code == 0, err
    assert "baking asked, 1 of 1" in err
    baked = place / "adapters.baked" / adapter_digest(place / "adapters" / "asked")
    assert "adapter asked: 4 virtual tokens of the 128 that a request may have, " in err
    assert f", digest {read_adapter(baked).digest[:12]}, asked 2" in err  # type: ignore[index]
    assert json.dumps(str(place / "adapters.baked")) in out
    assert contents(place / "adapters") == before
    code, again, err = serve(prefixcore, place, fake_python, "--bake", "--", "--dtype", "float32")
    assert (code, again) == (0, out)
    assert "baking" not in err


def test_where_nothing_is_to_be_baked(prefixcore: Any, place: Path, fake_python: str) -> None:
    shutil.rmtree(place / "adapters" / "asked")
    code, out, err = serve(prefixcore, place, fake_python, "--bake")
    assert code == 0, err
    assert "baked" not in out
    assert not (place / "adapters.baked").exists()


def test_a_folder_for_them_that_is_no_folder(prefixcore: Any, place: Path, fake_python: str) -> None:
    code, _, err = serve(prefixcore, place, fake_python, "--baked", place / "elsewhere")
    assert (code, "--bake is not given" in err) == (2, True)
    (place / "file").write_text("")
    code, _, err = serve(prefixcore, place, fake_python, "--bake", "--baked", place / "file")
    assert (code, "is not a folder" in err) == (2, True)


def test_a_prefix_whose_text_begins_at_0_is_baked_too(place: Path) -> None:
    """A server has the prefix's tokens before the text, at positions of their own."""
    shelf.write(place / "adapters" / "zero", seed=3, position_offset=False)
    model = describe_model(str(place / "model"))
    with pytest.raises(AdapterError, match=r"begins at position 0 \(position_offset=False\), and a server has"):
        Catalog(place / "adapters", model).find("zero")
    assert bake(place) == {}
    served = Catalog(place / "adapters", model, place / "baked").find("zero")
    assert served.baked_from == adapter_digest(place / "adapters" / "zero")
    assert read_adapter(served.folder).config.position_offset is True
    ids, logits = torch.tensor([[5, 6, 7]]), []
    for folder in (place / "adapters" / "zero", served.folder):
        model = tiny.model()
        with package.load(model, folder), torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
