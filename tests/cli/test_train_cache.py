"""`prefixcore train --cache-activations`: the same training, from kept activations, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from prefixcore.adapters import read_adapter, read_record

UPPER = ("--method", "prefix", "--num-virtual-tokens", 3, "--init", "vocab", "--layers", "1")


def prefix_of(folder) -> torch.Tensor:
    """What is in the file of an adapter whose prefix is trained as it is, [P, layers, 2, Hkv * D]."""
    (tensor,) = load_file(folder / "adapter_model.safetensors").values()
    return tensor.view(len(tensor), 2, 2, -1)


def test_the_same_is_learnt_and_the_folder_serves_the_next_training(train, tmp_path):
    assert train(*UPPER, out=tmp_path / "plain")[0] == 0
    for place in ("memory", "disk"):
        code, _, err = train(*UPPER, "--cache-activations", place, out=tmp_path / place)
        assert code == 0, err
        assert "activations before layer 1 take" in err
        first, second = (dict(read_record(tmp_path / name)["held_out_loss"]) for name in ("plain", place))
        assert first == pytest.approx(second, rel=1e-5)
        assert read_adapter(tmp_path / place).manifest.training["cache_activations"] == place
    kept = tmp_path / "disk.activations"
    record = json.loads((kept / "activations.json").read_text())
    assert (record["layer"], record["positions"], len(record["known"])) == (1, 3, 25)
    arguments = ("--cache-activations", "disk", "--activations-dir", kept)
    code, _, err = train(*UPPER, *arguments, "--lr", 0.01, out=tmp_path / "again")
    assert code == 0, err
    assert "25 of 25 texts are there already" in err
    assert not (tmp_path / "again.activations").exists()


def test_the_lower_layers_keep_their_start(train, tmp_path):
    whole = ("--method", "prefix", "--init-text", "ab -> ba", "--train-layers", "1")
    code, _, err = train(*whole, "--cache-activations", "memory", "--keep", "last")
    assert code == 0, err
    assert "activations before layer 1 take" in err
    assert train(*whole[:-2], "--lr", 1e-9, "--keep", "last", out=tmp_path / "start")[0] == 0
    found, start = (prefix_of(tmp_path / name) for name in ("adapter", "start"))
    torch.testing.assert_close(found[:, 0], start[:, 0], rtol=0, atol=1e-6)
    assert not torch.allclose(found[:, 1], start[:, 1], rtol=0, atol=1e-3)
    assert read_adapter(tmp_path / "adapter").manifest.training["train_layers"] == "1"


def test_layers_without_a_prefix_are_refused_before_anything_is_tokenized(train, tmp_path, monkeypatch):
    assert train(*UPPER, out=tmp_path / "upper")[0] == 0
    monkeypatch.setattr("prefixcore.cli.train.tokenize_all", lambda *arguments, **options: 1 / 0)
    cases = [
        (("--method", "prefix", "--num-virtual-tokens", 3, "--train-layers", "1,2"), "layer 2 is not among", "0 to 1"),
        ((*UPPER, "--train-layers", "1", "--prefix-projection"), "'mlp' is trained in place of the prefix", "--layers"),
        ((*UPPER, "--train-layers", "0"), "layer 0 is not among the layers with a prefix", "1 to 1"),
        (("--resume", tmp_path / "upper", "--train-layers", "0"), "layer 0 is not among", "1 to 1"),
        (("--method", "prompt", "--num-virtual-tokens", 3, "--train-layers", "1"), "is for --method prefix", "prompt"),
    ]
    for options, *said in cases:
        code, out, err = train(*options, out=tmp_path / "none")
        assert (code, out) == (2, "")
        assert all(words in err for words in said), err
    assert not (tmp_path / "none").exists()


def test_a_smaller_dtype(train, tmp_path):
    code, _, err = train(*UPPER, "--cache-activations", "memory", "--activation-dtype", "bfloat16")
    assert code == 0, err
    assert "numbers in bfloat16) in memory" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "prefix", "--init", "vocab", "--cache-activations", "memory"), "here is none below"),
        (("--method", "prompt", "--init", "vocab", "--cache-activations", "memory"), "here is none below"),
        ((*UPPER[:-1], "0,1", "--cache-activations", "disk"), "(or --layers) without the first ones"),
        ((*UPPER, "--activations-dir", "x"), "--activations-dir is for --cache-activations disk"),
        ((*UPPER, "--activation-dtype", "bfloat16"), "cache_activations is None"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_the_model_is_opened(train, tmp_path, monkeypatch, options, said):
    monkeypatch.setattr("prefixcore.cli.train.open_model", lambda arguments: 1 / 0)
    code, out, err = train(*options)
    assert (code, out) == (2, "")
    assert said in err
    assert not (tmp_path / "adapter").exists()


def test_a_folder_of_others_is_refused(train, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    code, _, err = train(*UPPER, "--cache-activations", "disk", "--activations-dir", tmp_path)
    assert code == 2
    assert "holds thesis.txt" in err


def test_runs_of_layers(train, tmp_path):
    assert train(*UPPER[:-1], "0-1")[0] == 0
    assert read_adapter(tmp_path / "adapter").config.layers == [0, 1]
    for wrong in ("1-0", "a", "0-99999999999"):
        code, _, err = train(*UPPER[:-1], wrong)
        assert code == 2
        assert "expected layer numbers like 0,1,2 or 15-29" in err
