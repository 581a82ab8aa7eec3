"""A folder of adapters: what is in it, what may be put there, and what it says of folders that are none."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import prefixcore
from prefixcore.adapters import AdapterError, Registry, adapter_digest, read_adapter, registry_log
from prefixcore.adapters.files import MANIFEST_FILE, MODEL_FILE
from tests.redigest import redigest

from .models import SHAPES, make_model, save

VERSION_1 = Path(__file__).parent / "version_1"
MANIFEST_AND_MORE = {"metrics": {"loss": 0.5, "exact_match": 0.75}, "split": {"name": "test"}}


@pytest.fixture(scope="module")
def sources(models, tmp_path_factory) -> Path:
    """Four adapters of two tasks and two base models; nobody changes them."""
    root = tmp_path_factory.mktemp("sources")
    for name, model, task in (
        ("capitals", models["llama"], "country -> capital"),
        ("capitals-2", models["llama"], "Country  -> CAPITAL"),
        ("sums", models["llama"], "add two numbers"),
        ("capitals-gpt2", models["gpt2"], "country -> capital"),
    ):
        save(root / name, "prompt", model, [], task=task, **(MANIFEST_AND_MORE if name == "sums" else {}))
    return root


@pytest.fixture
def registry(sources, tmp_path) -> Registry:
    registry = Registry(tmp_path / "registry")
    registry.add(sources / "capitals")
    registry.add(sources / "sums")
    return registry


def _names(registry: Registry) -> list[str]:
    return [entry.name for entry in registry.entries()]


def test_entries_say_what_is_there(registry, sources):
    capitals, sums = registry.entries()
    assert (capitals.name, capitals.task, capitals.method, capitals.problem) == (
        "capitals", "country -> capital", "prompt", None
    )  # fmt: skip
    assert capitals.digest == adapter_digest(sources / "capitals")
    assert capitals.size == sum(path.stat().st_size for path in capitals.path.iterdir())
    assert (capitals.score, capitals.metric) == (None, None)
    assert (sums.score, sums.metric) == (0.75, "exact_match")
    assert sums.date == sums.manifest.date
    assert sums.manifest.digest == sums.digest
    assert [entry.digest for entry in registry.entries(whole=True)] == [capitals.digest, sums.digest]


def test_a_folder_that_was_copied_by_hand_is_an_entry(registry, sources):
    shutil.copytree(sources / "capitals-gpt2", registry.directory / "by-hand")
    shutil.copytree(VERSION_1, registry.directory / "version-1")
    save(registry.directory / "peft", "prefix", make_model("llama"), SHAPES["llama"])
    (registry.directory / "peft" / MANIFEST_FILE).unlink()
    (registry.directory / "README.md").write_text("Adapters of ours.")
    entries = {entry.name: entry for entry in registry.entries()}
    assert entries.keys() == {"by-hand", "capitals", "peft", "sums", "version-1"}
    assert not any(entry.problem for entry in entries.values())
    assert (entries["peft"].manifest, entries["peft"].task, entries["peft"].date) == (None, None, None)
    assert (entries["version-1"].task, entries["version-1"].date) == ("say hello", None)
    for name, entry in entries.items():
        assert entry.digest == read_adapter(registry.directory / name).digest


def test_a_damaged_entry_is_shown_as_such(registry):
    manifest = registry.directory / "sums" / MANIFEST_FILE
    manifest.write_text(manifest.read_text().replace("add two", "add ten"))
    capitals, sums = registry.entries()
    assert capitals.problem is None
    assert "digest: " in sums.problem
    assert str(registry.directory) not in sums.problem
    assert registry.find("sums").problem == sums.problem
    shutil.rmtree(registry.directory / "sums")
    assert _names(registry) == ["capitals"]


def test_what_only_the_numbers_show_is_seen_where_they_are_read(registry):
    model = registry.directory / "sums" / MODEL_FILE
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    assert [entry.problem for entry in registry.entries()] == [None, None]
    assert "SHA-256 differs" in registry.entries(whole=True)[1].problem


def test_a_change_is_seen_by_a_registry_that_has_looked_before(registry, sources, monkeypatch):
    before = registry.entries()
    # What has not changed is not read again.
    monkeypatch.setattr("prefixcore.adapters.registry_entry.read_header", None)
    assert registry.entries() == before
    monkeypatch.undo()
    with prefixcore.attach(make_model("llama"), prefixcore.PromptTuningConfig(2, init="random")) as handle:
        handle.save(registry.directory / "sums", task="other")
    after = registry.entries()
    assert after[0] == before[0]
    assert after[1].digest == adapter_digest(registry.directory / "sums") != before[1].digest


def test_hostile_folders_are_said_in_words(registry, tmp_path):
    root = registry.directory
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "broken").symlink_to(tmp_path / "nothing")
    (root / "circle").symlink_to(root / "circle")
    (root / "empty").mkdir()
    (root / ("x" * 255)).mkdir()
    (root / "line\nbreak\x1b[2J").mkdir()
    (root / os.fsdecode(b"\xff")).mkdir()
    os.mkfifo(root / "pipe")
    (root / "device").mkdir()
    (root / "device" / MANIFEST_FILE).symlink_to("/dev/zero")
    (root / "nested").mkdir()
    (root / "nested" / MANIFEST_FILE).mkdir()
    problems = {entry.name: entry.problem for entry in registry.entries(whole=True)}
    assert {name for name, problem in problems.items() if problem is None} == {"capitals", "sums"}
    assert problems.keys() >= {"link", "broken", "circle", "empty", "x" * 255, "device", "nested"}
    assert all("not followed" in problems[name] for name in ("link", "broken", "circle"))
    assert "not an adapter" in problems["empty"]
    assert "not a file" in problems["device"]
    assert all(problem is None or problem.isprintable() for problem in problems.values())


def test_a_directory_that_is_none(tmp_path, sources):
    with pytest.raises(AdapterError, match="no such folder"):
        Registry(tmp_path / "missing").entries()
    with pytest.raises(AdapterError, match="no adapter is named 'a'; there are none"):
        Registry(tmp_path / "missing").find("a")
    (tmp_path / "empty").mkdir()
    assert Registry(tmp_path / "empty").entries() == []
    assert Registry(tmp_path / "empty").history() == []
    assert list((tmp_path / "empty").iterdir()) == []  # looking writes nothing
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="is not a folder"):
        Registry(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(AdapterError, match="a link to nothing"):
        Registry(tmp_path / "link")
    with pytest.raises(AdapterError, match="is itself an adapter"):
        Registry(sources / "capitals")


@pytest.mark.parametrize("name", ["", ".", "..", "../capitals", "capitals/../sums", ".prefixcore", "a\0b", 3])
def test_a_name_leads_nowhere_else(registry, name):
    with pytest.raises(AdapterError, match="no adapter is named .*; there are capitals, sums"):
        registry.find(name)


@pytest.mark.parametrize("name", ["", ".a", "a/b", "..", "a:b", "a@b", "a b", "x" * 53, "é", 3])
def test_a_name_is_what_a_server_can_be_asked_for(registry, sources, name):
    with pytest.raises(AdapterError, match="name: expected at most 52 letters"):
        registry.add(sources / "capitals-gpt2", name=name)
    assert _names(registry) == ["capitals", "sums"]


def test_what_is_added_is_a_copy(registry, sources):
    entry = registry.find("capitals")
    assert {p.name: p.read_bytes() for p in entry.path.iterdir()} == {
        p.name: p.read_bytes() for p in (sources / "capitals").iterdir()
    }
    assert (entry.path.stat().st_mode & 0o777) == (sources / "capitals").stat().st_mode & 0o777


def test_a_cache_of_downloads_is_copied_as_files(registry, sources, tmp_path):
    (tmp_path / "snapshot").mkdir()
    for path in (sources / "capitals-gpt2").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    entry = registry.add(tmp_path / "snapshot", name="gpt2")
    assert not any(path.is_symlink() for path in entry.path.iterdir())
    assert entry.problem is None


def test_no_two_do_one_task_for_one_base_model(registry, sources):
    for name in (None, "another"):
        with pytest.raises(AdapterError, match=r"capitals \(digest .* does this task for this base model already"):
            registry.add(sources / "capitals-2", name=name)
    assert registry.add(sources / "capitals-gpt2").name == "capitals-gpt2"  # another base model
    assert _names(registry) == ["capitals", "capitals-gpt2", "sums"]


def test_a_taken_name(registry, sources):
    with pytest.raises(AdapterError, match=r"sums is there already \(digest .*, task 'add two numbers'\)"):
        registry.add(sources / "capitals-gpt2", name="sums")
    with pytest.raises(AdapterError, match="sums would replace capitals and sums; remove one of them first"):
        registry.add(sources / "capitals-2", name="sums", replace=True)
    assert _names(registry) == ["capitals", "sums"]


def test_the_same_one_again_is_no_change(registry, sources):
    assert registry.add(sources / "capitals").digest == registry.find("capitals").digest
    assert len(registry.history()) == 2


@pytest.mark.parametrize("name", [None, "capitals", "cities"])
def test_replacing_keeps_what_was_there_known(registry, sources, name):
    before = registry.find("capitals")
    entry = registry.add(sources / "capitals-2", name=name, replace=True)
    assert entry.name == (name or "capitals")
    assert _names(registry) == sorted([entry.name, "sums"])
    event = registry.history()[-1]
    assert (event.action, event.name, event.digest) == ("replace", entry.name, adapter_digest(sources / "capitals-2"))
    assert [(old.name, old.digest, old.date) for old in event.replaced] == [("capitals", before.digest, before.date)]
    assert sorted(path.name for path in registry.directory.iterdir()) == sorted([registry_log.STATE, *_names(registry)])


def test_removing(registry):
    digest = registry.find("sums").digest
    registry.remove("sums")
    assert _names(registry) == ["capitals"]
    event = registry.history()[-1]
    assert (event.action, event.digest, event.replaced[0].digest) == ("remove", None, digest)
    with pytest.raises(AdapterError, match="no adapter is named 'sums'; there are capitals"):
        registry.remove("sums")


def test_a_damaged_one_can_be_replaced_and_another_folder_cannot(registry, sources):
    (registry.directory / "sums" / MODEL_FILE).write_bytes(b"")
    entry = registry.add(sources / "sums", replace=True)
    assert entry.problem is None
    assert registry.history()[-1].replaced[0].digest is None
    (registry.directory / "photos").mkdir()
    (registry.directory / "photos" / "cat.png").write_bytes(b"cat")
    for what in (lambda: registry.add(sources / "capitals-gpt2", "photos", True), lambda: registry.remove("photos")):
        with pytest.raises(AdapterError, match="photos: holds 'cat.png' and is no adapter, so it is not replaced"):
            what()
    assert (registry.directory / "photos" / "cat.png").read_bytes() == b"cat"
    assert registry.add(sources / "capitals-gpt2").problem is None  # the one before has left nothing half done


def test_only_an_adapter_with_a_task_is_added(registry, models, tmp_path):
    save(tmp_path / "nameless", "prompt", models["gpt2"], [])
    with pytest.raises(AdapterError, match="names no task"):
        registry.add(tmp_path / "nameless")
    (tmp_path / "nameless" / MANIFEST_FILE).unlink()
    with pytest.raises(AdapterError, match="was written by PEFT and names no task"):
        registry.add(tmp_path / "nameless")
    with pytest.raises(AdapterError, match="no such folder"):
        registry.add(tmp_path / "nothing")
    assert _names(registry) == ["capitals", "sums"]


def test_a_damaged_adapter_is_not_added(registry, sources, tmp_path):
    copied = shutil.copytree(sources / "capitals-gpt2", tmp_path / "copy")
    fields = json.loads((copied / MANIFEST_FILE).read_text())
    (copied / MANIFEST_FILE).write_text(json.dumps({**fields, "task": "another"}))
    with pytest.raises(AdapterError, match="digest: "):
        registry.add(copied)
    assert registry.add(redigest(copied)).task == "another"
    (copied / "inside").mkdir()
    with pytest.raises(AdapterError, match="an adapter has no subfolders"):
        registry.add(copied, name="again")


def test_one_that_is_changed_while_it_is_copied(registry, sources, tmp_path, monkeypatch):
    copied = shutil.copytree(sources / "capitals-gpt2", tmp_path / "copy")
    real = prefixcore.adapters.registry._contents

    def changed(folder):
        files = real(folder)
        other = shutil.copytree(sources / "sums", tmp_path / "other", dirs_exist_ok=True)
        return files | {name: (other / name).read_bytes() for name in files}

    monkeypatch.setattr("prefixcore.adapters.registry._contents", changed)
    with pytest.raises(AdapterError, match="was changed while it was copied"):
        registry.add(copied)
    assert _names(registry) == ["capitals", "sums"]
    assert len(registry.history()) == 2


def test_a_full_disk_leaves_it_as_it_was(registry, sources, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prefixcore.adapters.replace.write_new", full)
    with pytest.raises(OSError, match=f"No space left on device: .{registry.directory}."):
        registry.add(sources / "capitals-2", replace=True)
    monkeypatch.undo()
    assert registry.find("capitals").digest == adapter_digest(sources / "capitals")
    assert len(registry.history()) == 2
    registry.add(sources / "capitals-2", replace=True)
    assert [event.action for event in registry.history()] == ["add", "add", "replace"]


def test_a_writer_that_waits_too_long_says_so(registry, sources, monkeypatch):
    monkeypatch.setattr(registry_log, "PATIENCE", 0.05)
    other = Registry(registry.directory)
    with (
        registry._log.locked(lambda event: False, lambda event: None),
        pytest.raises(AdapterError, match="another process has been writing to it for 0.05 seconds"),
    ):
        other.add(sources / "capitals-gpt2")
    assert other.entries() == registry.entries()  # readers never wait


def test_a_log_that_somebody_has_damaged_is_read_as_far_as_it_can_be(registry, sources):
    log = registry.directory / registry_log.STATE / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"half": \n[1]\nnull\n{"time": 3}\n"x')
    assert len(registry.history()) == 2
    registry.add(sources / "capitals-gpt2")
    assert len(registry.history()) == 3
    pending = registry.directory / registry_log.STATE / "pending.json"
    hostile = {"time": "", "action": "remove", "name": "../../etc", "digest": None, "task": "", "replaced": []}
    pending.write_text(json.dumps(hostile))
    assert len(registry.history()) == 3
    registry.remove("sums")
    assert not pending.exists()
    assert len(registry.history()) == 4


def test_a_checkpoint_is_noticed_when_it_changes(sources, tmp_path):
    """Its adapter lies one folder deeper."""
    inside = tmp_path / "registry" / "step-8" / "prefixcore"
    shutil.copytree(sources / "capitals", inside)
    registry = Registry(tmp_path / "registry")
    (before,) = registry.entries()
    assert before.size == sum(path.stat().st_size for path in inside.iterdir())
    assert registry.entries()[0] is before
    shutil.rmtree(inside)
    shutil.copytree(sources / "sums", inside)
    (after,) = registry.entries()
    assert after.digest == adapter_digest(sources / "sums") != before.digest


def test_no_registry_is_made_in_an_adapter(sources, tmp_path):
    """Which then is none that can be replaced, or added anywhere."""
    shutil.copytree(sources / "capitals", tmp_path / "capitals")
    with pytest.raises(AdapterError, match="would be in .*capitals, which is an adapter and has no subfolders"):
        Registry(tmp_path / "capitals" / "registry").add(tmp_path / "capitals")
    Registry(tmp_path / "registry").add(tmp_path / "capitals")


def test_a_registry_that_is_not_there_has_no_history(tmp_path):
    with pytest.raises(AdapterError, match="no such folder; expected a folder of adapters"):
        Registry(tmp_path / "nowhere").history()
