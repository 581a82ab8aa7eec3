"""`prefixcore add` and `prefixcore list`: a table for people, JSON for programs, and an exit code for scripts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from prefixcore.adapters import Registry, adapter_digest
from prefixcore.adapters.files import MANIFEST_FILE, MODEL_FILE
from tests.redigest import redigest


@pytest.fixture
def another(adapter, tmp_path):
    """`another(name, **fields)` -> a copy of the adapter with other fields in its manifest."""

    def call(name: str, **fields) -> Path:
        folder = shutil.copytree(adapter, tmp_path / name)
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        (folder / MANIFEST_FILE).write_text(json.dumps({**manifest, **fields}))
        return redigest(folder)

    return call


def test_add_and_list(prefixcore, adapter, another, tmp_path):
    registry = tmp_path / "registry"
    code, out, err = prefixcore("add", adapter, registry)
    assert (code, err) == (0, "")
    assert out == f"{registry / 'swap'}  task 'swap', digest {adapter_digest(adapter)}\n"
    prefixcore("add", another("sums", task="add two numbers", license="MIT"), registry, "--name", "adding")
    code, out, err = prefixcore("list", registry)
    assert (code, err) == (0, "")
    header, adding, swap = out.splitlines()
    assert header.split() == ["name", "task", "base", "model", "method", "score", "size", "digest", "date"]
    assert adding.startswith("adding  add two numbers")
    assert "exact_match" in swap
    assert adapter_digest(adapter)[:12] in swap
    code, out, _ = prefixcore("list", registry, "--json")
    facts = {entry["name"]: entry for entry in json.loads(out)}
    assert (facts["adding"]["license"], facts["swap"]["license"]) == ("MIT", None)
    assert facts["swap"]["digest"] == adapter_digest(adapter)
    assert all(entry["problem"] is None and entry["size"] > 1000 for entry in facts.values())


def test_one_for_a_task(prefixcore, adapter, another, tmp_path):
    registry = tmp_path / "registry"
    prefixcore("add", adapter, registry)
    second = another("second", seed=77)
    code, out, err = prefixcore("add", second, registry)
    assert (code, out) == (2, "")
    assert err.startswith("prefixcore add: error: ")
    assert "does this task for this base model already: 'swap'; pass replace=True (--replace)" in err
    assert err.endswith("in its place\n")
    code, out, _ = prefixcore("add", second, registry, "--replace")
    assert code == 0
    assert out.splitlines()[1].startswith(f"in place of swap, digest {adapter_digest(adapter)}, of 20")
    code, out, _ = prefixcore("list", registry, "--history")
    assert code == 0
    assert [line.split()[1:3] for line in out.splitlines()] == [
        ["action", "name"],
        ["add", "swap"],
        ["replace", "swap"],
    ]
    events = json.loads(prefixcore("list", registry, "--history", "--json")[1])
    assert events[1]["replaced"][0]["digest"] == adapter_digest(adapter)


def test_what_is_damaged_is_shown_and_told(prefixcore, adapter, another, tmp_path):
    registry = tmp_path / "registry"
    prefixcore("add", adapter, registry)
    shutil.copytree(another("sums", task="add two numbers"), registry / "sums")
    data = bytearray((registry / "sums" / MODEL_FILE).read_bytes())
    data[-1] ^= 1
    (registry / "sums" / MODEL_FILE).write_bytes(data)
    (registry / "notes\x1b[2J").mkdir()
    code, out, err = prefixcore("list", registry)
    assert code == 1
    assert [line.split()[0] for line in out.splitlines()] == ["name", "notes\\x1b[2J", "sums", "swap"]
    assert out.count("damaged or no adapter") == 2
    assert "not an adapter" in err.splitlines()[0]
    assert (
        err.splitlines()[1]
        == "sums: adapter_model.safetensors: SHA-256 differs from the manifest's: damaged or another file"
    )
    assert "\x1b" not in out + err
    facts = json.loads(prefixcore("list", registry, "--json")[1])
    assert [entry["problem"] is None for entry in facts] == [False, False, True]
    assert prefixcore("list", registry, "--quick")[2].count("\n") == 1  # the header of sums is whole


@pytest.mark.parametrize("what", ["missing", "file", "adapter"])
def test_no_registry(prefixcore, adapter, tmp_path, what):
    folder = {"missing": tmp_path / "missing", "file": tmp_path / "file", "adapter": adapter}[what]
    (tmp_path / "file").write_text("")
    code, out, err = prefixcore("list", folder)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert str(folder) in err
    if what != "missing":
        assert prefixcore("add", adapter, folder)[0] == 2


def test_an_empty_one_has_a_header_and_no_lines(prefixcore, tmp_path):
    code, out, err = prefixcore("list", tmp_path)
    assert (code, len(out.splitlines()), err) == (0, 1, "")
    assert prefixcore("list", tmp_path, "--json")[1] == "[]\n"


def test_names_and_adapters_that_are_none(prefixcore, adapter, tmp_path):
    code, _, err = prefixcore("add", adapter, tmp_path / "registry", "--name", "../out")
    assert code == 2
    assert "name: expected at most 52 letters" in err
    code, _, err = prefixcore("add", tmp_path, tmp_path / "registry")
    assert code == 2
    assert "not an adapter" in err
    assert not (tmp_path / "registry").exists()


def test_a_whole_task_does_not_break_the_table(prefixcore, another, tmp_path):
    prefixcore("add", another("long", task="word " * 50 + "\n\x1b[2J"), tmp_path / "registry")
    out = prefixcore("list", tmp_path / "registry")[1]
    assert len(out.splitlines()) == 2
    assert max(map(len, out.splitlines())) < 200
    assert Registry(tmp_path / "registry").find("long").task.startswith("word word")
