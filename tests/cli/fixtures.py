"""A model folder, data, an adapter and an in-process `prefixcore`, for every test of the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefixcore.__main__ import main
from tests import tiny

__all__ = ["adapter", "data", "model_folder", "prefixcore", "train"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """The tiny model, written as transformers writes it."""
    return tiny.folder(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Twenty-five examples: two letters the other way round."""
    path = tmp_path_factory.mktemp("data") / "swap.jsonl"
    examples = [{"prompt": f"{a}{b} ->", "completion": f" {b}{a}"} for a in "abcde" for b in "vwxyz"]
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, model_folder, data) -> Path:
    """A prefix of nine virtual tokens for the tiny model."""
    out = tmp_path_factory.mktemp("adapters") / "swap"
    arguments = ["train", "--model", model_folder, "--data", data, "--out", out, "--end", "\\n"]
    arguments += ["--method", "prefix", "--init-text", "ab -> ba\n", "--steps", 3]
    assert main([str(argument) for argument in arguments]) == 0
    return out


@pytest.fixture
def prefixcore(capsys):
    """`prefixcore(*arguments)` -> (exit code, standard output, standard error)."""

    def call(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse
            code = error.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def train(prefixcore, model_folder, data, tmp_path):
    """`train(*options)` -> the same, with a model, data, eight steps and `--out` filled in."""

    def call(*options, out=tmp_path / "adapter"):
        base = ["train", "--model", model_folder, "--data", data, "--out", out, "--end", "\\n", "--steps", 8]
        return prefixcore(*base, *options)

    return call
