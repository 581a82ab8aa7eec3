"""What the tests of wrong command lines share: calls that must be refused, and folders with one entry changed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.cli.fixtures import *  # noqa: F403
from tests.cli.fixtures import __all__ as _cli
from tests.redigest import redigest

__all__ = [*_cli, "refused", "refused_generation", "refused_training"]

ROOT = Path(__file__).parents[2]
NEW = ("--method", "prompt", "--num-virtual-tokens", 2)


@pytest.fixture
def refused(prefixcore):
    """`refused(*arguments)` -> the one line of an error: exit code 2, no results, no traceback."""

    def call(*arguments):
        code, out, err = prefixcore(*arguments)
        assert (code, out) == (2, ""), err
        assert "Traceback" not in err
        line = err.splitlines()[-1]
        assert line.startswith("prefixcore ")
        assert ": error: " in line
        assert err.isascii() or line.isprintable()
        return line

    return call


@pytest.fixture
def refused_training(refused, model_folder, data, tmp_path):
    """`refused_training(*options)` -> the same of `train`, with a model, data and `--out`, which stays unwritten."""

    def call(*options):
        base = ["train", "--model", model_folder, "--data", data, "--out", tmp_path / "out", "--steps", 2]
        line = refused(*base, *(NEW if "--resume" not in options else ()), *options)
        assert not (tmp_path / "out").exists()
        return line

    return call


@pytest.fixture
def refused_generation(refused, model_folder, adapter):
    def call(*options):
        return refused("generate", "--model", model_folder, "--adapter", adapter, "--max-new-tokens", 3, *options)

    return call


def copy(folder: Path, target: Path, name: str, contents: object) -> Path:
    """A copy of a folder in which the entry `name` is something else."""
    shutil.copytree(folder, target)
    path = target / name
    path.unlink(missing_ok=True)
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    elif isinstance(contents, str):
        path.symlink_to(contents)
    elif contents is os.mkfifo or contents is os.mkdir:
        contents(path)
    return target


def changed(folder: Path, target: Path, name: str, **fields: object) -> Path:
    """A copy of a folder in which fields of a JSON file are others, and the digests are those of the new file."""
    values = {**json.loads((folder / name).read_text()), **fields}
    return redigest(copy(folder, target, name, json.dumps(values).encode()))
