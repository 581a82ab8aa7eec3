"""Places that nothing can be written to are known before training, and a training that fails leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefixcore.adapters import replace
from prefixcore.cli import train as train_command

from .commands import NEW


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

    monkeypatch.setattr(replace, "_write", full)
    code, out, err = train(*NEW)
    assert (code, out) == (2, "")
    assert "cannot be written (No space left on device); give a folder" in err.splitlines()[-1]
    assert "as it was before, or the new adapter, whole" in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_diverges_saves_nothing(refused, model_folder, data, tmp_path):
    base = ["train", "--model", model_folder, "--data", data, "--out", tmp_path / "out", *NEW, "--lr", "1e38"]
    line = refused(*base, "--steps", 1, "--eval-fraction", 0, "--weight-decay", "1e30")
    assert "NaN or infinite" in line
    assert list(tmp_path.iterdir()) == []
