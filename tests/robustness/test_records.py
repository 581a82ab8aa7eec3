"""Records and manifests are read as what a stranger wrote: damaged ones are one line."""

from __future__ import annotations

import json
import os

import pytest

from tests.redigest import redigest

from .commands import changed, copy


@pytest.mark.parametrize("name", ["training.json", "prefixcore_manifest.json", "adapter_config.json"])
@pytest.mark.parametrize("contents", [os.mkfifo, os.mkdir, "/dev/zero", b"\xff", b"[]", b"[" * 100_000, b" " * 2**23])
def test_damaged_records(refused, refused_training, refused_generation, adapter, tmp_path, name, contents):
    folder = copy(adapter, tmp_path / "adapter", name, contents)
    assert name in refused("inspect", folder)
    assert name in refused_generation("--adapter", folder, "--prompt", "a")
    assert name in refused_training("--resume", folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"end": 5},
        {"end": ["a"]},
        {"split": 7},
        {"split": {"seed": "a", "fraction": 0.1}},
        {"split": {"seed": 2**70, "fraction": 0.1}},
        {"split": {"seed": 1, "fraction": 10**400}},
        {"held_out": {"bare model": {"loss": 10**400, "exact_match": 0, "examples": 2}}},
        {"held_out": [1]},
        {"held_out": {"bare model": {"loss": "low", "exact_match": 0, "examples": 1}}},
        {"train_loss": 5},
    ],
    ids=str,
)
def test_records_of_wrong_types(refused, refused_training, refused_generation, adapter, tmp_path, fields):
    folder = changed(adapter, tmp_path / "adapter", "training.json", **fields)
    assert "training.json" in refused("inspect", folder)
    assert "training.json" in refused_generation("--adapter", folder, "--prompt", "a")
    assert "training.json" in refused_training("--resume", folder)


def test_a_split_that_no_generator_made_is_as_none(train, adapter, tmp_path):
    folder = changed(adapter, tmp_path / "earlier", "training.json", split={"seed": -1, "fraction": 0.5})
    code, _, err = train("--resume", folder, "--steps", 1)
    assert code == 0, err
    assert "warning: what is held out now" in err


def test_numbers_that_are_none_are_shown_as_they_are(prefixcore, adapter, tmp_path):
    scores = {"loss": float("nan"), "exact_match": float("inf"), "examples": 2}
    folder = changed(adapter, tmp_path / "adapter", "training.json", held_out={"bare model": scores})
    code, out, err = prefixcore("inspect", folder)
    assert (code, err) == (0, "")
    assert "loss nan, exact match inf% of 2" in out


def test_a_record_that_is_nested_as_deep_as_can_be_read(prefixcore, adapter, tmp_path):
    text = json.dumps({**json.loads((adapter / "training.json").read_text()), "options": "HERE"})
    codes = []
    for depth in (100, 300, 500, 900, 3000):
        deep = text.replace('"HERE"', "[" * depth + "]" * depth).encode()
        folder = redigest(copy(adapter, tmp_path / str(depth), "training.json", deep))
        for options in ([], ["--json"]):
            code, _, err = prefixcore("inspect", folder, *options)
            codes.append(code)
            assert (code, err) == (0, "") or (code == 2 and len(err.splitlines()) == 1)
    assert set(codes) == {0, 2}
