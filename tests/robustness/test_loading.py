"""A load that is refused raises AdapterError, names the file, has read no number and leaves the model as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import prefixcore
from prefixcore import AdapterError
from prefixcore.adapters import read_adapter, read_record, tensors
from prefixcore.adapters.tensors import TensorFile

from ..adapters.models import make_model
from .adapter_folders import KINDS, MANIFEST, MODEL, NOT_BY_PREFIXCORE, PEFT, RECORD, STATE, refused

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which a number is read."""

    def read(self: TensorFile, *args: Any) -> Any:
        raise AssertionError(f"numbers of {self.path} were read")

    monkeypatch.setattr(TensorFile, "read_pieces", read)


# --- Refused before any number is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, *(f"{kind} alone" for kind in NOT_BY_PREFIXCORE)])
def test_another_model_is_refused_by_the_headers(
    kind: str, trainable: bool, kinds: dict[str, Path], no_numbers: None
) -> None:
    changes = {"hidden_size": 64, "num_key_value_heads": 1}
    message = refused(make_model("llama", **changes), kinds[kind], kind, trainable=trainable)
    assert "model has" in message or "embeddings have" in message


def test_other_weights_are_refused_by_the_manifest(kinds: dict[str, Path], no_numbers: None) -> None:
    assert "other weights" in refused(make_model("llama", seed=3), kinds["ours"], MANIFEST)


@pytest.mark.parametrize("file", [MODEL, STATE])
def test_a_header_that_is_not_the_manifests_is_refused_before_its_numbers(
    file: str, model: Any, copy_of: Any, no_numbers: None
) -> None:
    folder = copy_of("ours")
    (folder / file).write_bytes((folder / file).read_bytes()[:-4])
    refused(model, folder, file)
    folder = copy_of("peft alone")
    save_file({"prompt_embeddings": torch.zeros(5, 127)}, folder / MODEL)
    refused(model, folder, MODEL)


def test_a_training_state_is_hashed_but_not_read_by_a_load_that_does_not_train(
    model: Any, copy_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read = copy_of("mlp"), []
    original = TensorFile.read_pieces

    def spy(self: TensorFile, *args: Any, **kwargs: Any) -> None:
        read.append(self.path.name)
        original(self, *args, **kwargs)

    monkeypatch.setattr(TensorFile, "read_pieces", spy)
    prefixcore.load(model, folder).detach()
    assert read == [MODEL]
    prefixcore.load(model, folder, trainable=True).detach()
    assert read == [MODEL, MODEL, STATE]
    data = bytearray((folder / STATE).read_bytes())
    data[-3] ^= 1
    (folder / STATE).write_bytes(data)
    read.clear()
    refused(model, folder, STATE)
    assert read == []
    refused(model, folder, STATE, trainable=True)


# --- Entries that are no files ---------------------------------------------------------------------------------------


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def nowhere(path: Path) -> None:
    path.symlink_to("not-there")


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


OTHERS = {"loop": loop, "nowhere": nowhere, "endless": endless, "pipe": os.mkfifo, "folder": Path.mkdir}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("file", [MANIFEST, PEFT, MODEL, STATE])
def test_what_is_there_but_no_file_is_not_absent(what: str, file: str, model: Any, copy_of: Any) -> None:
    """Without its manifest, PEFT's two files would load on any weights."""
    folder = copy_of("mlp")
    (folder / file).unlink()
    OTHERS[what](folder / file)
    refused(model, folder, file)
    refused(make_model("llama", seed=3), folder, file)


@pytest.mark.parametrize("what", OTHERS)
def test_a_record_that_is_no_file(what: str, copy_of: Any) -> None:
    folder = copy_of("peft")
    (folder / RECORD).unlink()
    OTHERS[what](folder / RECORD)
    with pytest.raises(AdapterError, match=RECORD):
        read_record(folder)


def test_links_to_files_are_read(model: Any, kinds: dict[str, Path], tmp_path: Path) -> None:
    """As in the cache of a hub."""
    for path in kinds["mlp"].iterdir():
        (tmp_path / path.name).symlink_to(path)
    with prefixcore.load(model, tmp_path, trainable=True) as handle:
        assert handle.num_virtual_tokens == 5


@pytest.mark.parametrize("file", ["", MANIFEST, PEFT, MODEL, STATE])
def test_what_may_not_be_read(file: str, model: Any, copy_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of("mlp")
    if os.geteuid() == 0:  # who may read everything: the system refuses by hand
        real = os.stat

        def stat(path: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(path, int) and Path(path) == folder / file:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(os, "stat", stat)
        monkeypatch.setattr(Path, "stat", stat)  # Python 3.10's keeps the function that it imported
        refused(model, folder, "cannot be read: Permission denied")
    else:
        (folder / file).chmod(0)
        try:
            refused(model, folder, "cannot be read: Permission denied")
        finally:
            (folder / file).chmod(0o700)


# --- Pieces and memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("piece", [4, 60, 2**20])
def test_numbers_are_read_in_pieces_of_any_size(
    dtype: torch.dtype, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "PIECE", piece)
    expected = {
        "b": torch.randn(3, 5).to(dtype),
        "a": torch.randn(7).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "one": torch.tensor(2.5, dtype=dtype),
    }
    save_file(expected, tmp_path / "file")
    with TensorFile(tmp_path / "file") as file:
        read, rounded = file.read(dtype=None), file.read()
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor)
        assert torch.equal(rounded[name], tensor.float())


def test_peft_files_are_read_in_pieces_of_any_size(kinds: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_adapter(kinds["peft alone"]).tensors
    for piece in (1, 600, 1200):
        monkeypatch.setattr(tensors, "PIECE", piece)
        for pair, reference in zip(read_adapter(kinds["peft alone"]).tensors, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(pair, reference, strict=True))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak of memory that can be reset")
@pytest.mark.parametrize(
    "cases",
    [
        ["ours:load", "peft:load", "peft:train", "prompt:load", "state:load", "state:train"],
        pytest.param(["state:read", "basis:train", "prompt state:train", "mlp:train"], marks=pytest.mark.slow),
    ],
    ids=["plain", "made of others"],
)
def test_a_load_takes_the_memory_of_its_numbers(cases: list[str]) -> None:
    """Not that of two or three copies: 64 MB of values, and what a process needs besides.

    A training state has them again, as initial values or as what makes them; a random basis makes its signs besides.
    """
    command = [sys.executable, "-m", "tests.robustness.memory", "64", *cases]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert list(measured) == cases
    for case, found in measured.items():
        needed = 64 * 2**20 if case.endswith(":load") else found["files"]
        assert found["rise"] > 0.9 * 64 * 2**20, case  # it was there at all
        assert found["rise"] < (1.9 if case.startswith("basis") else 1.3) * needed, case
