"""`prefixcore train` says by itself where an adapter comes from, and `inspect` shows it."""

from __future__ import annotations

import hashlib
import json

import pytest

from prefixcore.adapters import adapter_digest, read_adapter, read_record
from prefixcore.training import read_jsonl, split

METHOD = ("--method", "prompt", "--num-virtual-tokens", 3)


def _sha256(examples) -> str:
    """As a person computes it who has read the manual."""
    lines = sorted(
        json.dumps({"completion": e.completion, "prompt": e.prompt}, sort_keys=True, separators=(",", ":")) + "\n"
        for e in examples
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.fixture
def manifest_of(train, tmp_path):
    def call(*options, out=tmp_path / "swap-letters"):
        code, _, err = train(*options, out=out)
        assert code == 0, err
        return read_adapter(out).manifest

    return call


def test_everything_is_filled_in(manifest_of, data, tmp_path):
    said = ("--task", "two letters swapped", "--license", "MIT", "--intended-use", "A test.")
    manifest = manifest_of(*METHOD, *said, "--seed", 5)
    training, held_out = split(read_jsonl(data), 0.1, 5)
    assert (manifest.task, manifest.license, manifest.intended_use) == said[1::2]
    assert manifest.data == {"name": "swap.jsonl", "examples": 23, "sha256": _sha256(training)}
    assert manifest.split == {
        "name": "held out of swap.jsonl", "seed": 5, "fraction": 0.1, "examples": 2, "sha256": _sha256(held_out)
    }  # fmt: skip
    after = read_record(tmp_path / "swap-letters")["held_out"]["after training"]
    assert manifest.metrics == {"exact_match": after["exact_match"], "loss": after["loss"]}
    assert manifest.seed == 5
    settings = {"steps": 8, "steps_done": 8, "batch_size": 8, "end": "\n", "dtype": "float32", "learning_rate": 5e-3}
    assert settings.items() <= manifest.training.items()


def test_a_file_of_its_own_is_the_split(manifest_of, data, tmp_path):
    other = tmp_path / "test.jsonl"
    other.write_text('{"prompt": "fg ->", "completion": " gf"}\n')
    manifest = manifest_of(*METHOD, "--eval-data", other)
    assert manifest.split == {"name": "test.jsonl", "examples": 1, "sha256": _sha256(read_jsonl(other))}
    assert manifest.data["sha256"] == _sha256(read_jsonl(data))


def test_what_was_not_measured_is_not_said(manifest_of):
    manifest = manifest_of(*METHOD, "--eval-fraction", 0)
    assert (manifest.metrics, manifest.split, manifest.license) == (None, None, None)
    assert manifest.data["examples"] == 25
    assert manifest.task == "swap-letters"  # the folder


def test_going_on_keeps_what_the_author_said(manifest_of, tmp_path):
    manifest_of(*METHOD, "--task", "two letters swapped", "--license", "MIT")
    again = manifest_of("--resume", tmp_path / "swap-letters", out=tmp_path / "again")
    assert (again.task, again.license) == ("two letters swapped", "MIT")
    assert [parent["digest"] for parent in again.derived_from] == [adapter_digest(tmp_path / "swap-letters")]
    renamed = manifest_of("--resume", tmp_path / "swap-letters", "--task", "other", out=tmp_path / "third")
    assert renamed.task == "other"


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--task", " ", "expected a text, got an empty one"),
        ("--license", "x" * 2001, "expected at most 2000 characters, got 2001"),
        ("--intended-use", "\udc80", "expected UTF-8 text"),
    ],
)
def test_an_author_says_something_or_nothing(train, tmp_path, option, text, message):
    code, _, err = train(*METHOD, option, text)
    assert code == 2
    assert message in err
    assert not (tmp_path / "adapter").exists()


def test_inspect_shows_it(prefixcore, manifest_of, tmp_path):
    manifest = manifest_of(*METHOD, "--license", "MIT")
    folder = tmp_path / "swap-letters"
    code, out, err = prefixcore("inspect", folder)
    assert (code, err) == (0, "")
    lines = dict(line.split("  ", 1) for line in out.splitlines())
    assert lines["digest"].strip() == adapter_digest(folder)
    assert lines["license"].strip() == "MIT"
    assert lines["intended use"].strip() == "not said"
    assert manifest.data["sha256"] in lines["data"]
    assert "exact_match" in lines["metrics"]
    assert lines["settings"].strip().startswith("seed 0, ")
    facts = json.loads(prefixcore("inspect", folder, "--json")[1])
    assert facts["digest"] == adapter_digest(folder)
    assert facts["split"] == manifest.split
    assert facts["settings"] == manifest.training
    assert len(facts["training"]["train_loss"]) == 8
