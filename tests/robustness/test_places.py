"""Places that nothing can be written to are known before training, and a training that fails leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefixcore import bake, export_adapter, import_adapter, load
from prefixcore.adapters import AdapterError, Registry, replace
from prefixcore.cli import train as train_command
from tests import tiny

from .commands import NEW

CALLS = {
    "load": lambda adapter, path: load(tiny.model(), path),
    "save": lambda adapter, path: load(tiny.model(), adapter).save(path),
    "bake": lambda adapter, path: bake(tiny.model(), adapter, path),
    "registry": lambda adapter, path: Registry(path),
    "export": lambda adapter, path: export_adapter(adapter, "cartridges", path),
    "import": lambda adapter, path: import_adapter(path, "cartridges", path.parent / "out", model=tiny.model()),
}


@pytest.mark.parametrize(
    "out", ["", ".", "./", "..", "x/..", "/", "/proc/x", "/dev/null/x", "x" * 250, "x" * 5000, "\udcff"]
)
def test_places_that_no_adapter_can_have(refused, model_folder, data, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_command, "open_model", None)  # it is known before
    refused("train", "--model", model_folder, "--data", data, f"--out={out}", *NEW)
    refused("train", "--model", model_folder, "--data", data, f"--out={tmp_path}", *NEW)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_nobody_may_write_to(refused_training, tmp_path, monkeypatch):
    def mkdir(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(train_command, "open_model", None)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert "cannot be written: Permission denied" in refused_training()


def test_a_disk_that_is_full_at_the_end(train, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(replace, "write_new", full)
    code, out, err = train(*NEW)
    assert (code, out) == (2, "")
    assert "cannot be written (No space left on device); give a folder" in err.splitlines()[-1]
    assert "as it was before, or the new adapter, whole" in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["convert", "audit", "distill"])
def test_a_full_disk_is_named(refused, adapter, model_folder, data, tmp_path, monkeypatch, command):
    def full(self, data):
        raise OSError(28, "No space left on device")  # as writing to an open file does, with no name

    monkeypatch.setattr(Path, "write_bytes", full)
    (tmp_path / "text").write_text("ab -> ba\ncd -> dc\n")
    out, model = tmp_path / "out.html", ["--model", model_folder]
    options = {
        "convert": [adapter, "--to", "cartridges"],
        "audit": [adapter, *model, "--probe", data, "--limit", 2, "--trials", 0],
        "distill": [*model, "--context", tmp_path / "text", "--num-virtual-tokens", 2, "--prompts", data, "--steps", 1],
    }
    line = refused(command, *options[command], "--out", out)
    assert f"{tmp_path}" in line
    assert "No space left on device" in line
    assert not out.exists()


@pytest.mark.parametrize("call", CALLS)
def test_a_path_with_a_nul_character(adapter, tmp_path, call):
    with pytest.raises(AdapterError, match=r"'.*a\\x00b': a path cannot hold a NUL character"):
        CALLS[call](adapter, tmp_path / "a\0b")
    assert list(tmp_path.iterdir()) == []


def test_an_argument_with_a_nul_character(refused):
    assert "holds a NUL character" in refused("inspect", "a\0b")


def test_a_training_that_diverges_saves_nothing(refused, model_folder, data, tmp_path):
    base = ["train", "--model", model_folder, "--data", data, "--out", tmp_path / "out", *NEW, "--lr", "1e38"]
    line = refused(*base, "--steps", 1, "--eval-fraction", 0, "--weight-decay", "1e30")
    assert "NaN or infinite" in line
    assert list(tmp_path.iterdir()) == []
