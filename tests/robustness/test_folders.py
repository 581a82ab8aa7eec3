"""What a save keeps, drops, recovers and refuses in and around the folder that it replaces."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from prefixcore.adapters import AdapterError, check_target, read_adapter, read_record, replace

from .saves import save

MANIFEST, MODEL, RECORD, CURVE = (
    "prefixcore_manifest.json",
    "adapter_model.safetensors",
    "training.json",
    "curve.png",
)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    save(tmp_path / "an adapter [1]", 1)
    return tmp_path / "an adapter [1]"


def beside(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path != target)


def tokens(target: Path) -> int | None:
    return read_adapter(target).config.num_virtual_tokens


def test_a_record_goes_with_its_values(target: Path) -> None:
    (target / "notes.txt").write_text("mine")
    save(target, 1, record=False)  # the same values: it is still theirs
    assert read_record(target)["model"] == "1"
    assert (target / CURVE).exists()
    save(target, 2, record=False)
    assert read_record(target) == {}
    assert sorted(path.name for path in target.iterdir()) == [
        "adapter_config.json",
        MODEL,
        "notes.txt",
        MANIFEST,
    ]


def test_a_record_of_other_values_is_not_taken_for_theirs(target: Path, tmp_path: Path) -> None:
    save(tmp_path / "other", 2, record=False)
    (tmp_path / "other" / RECORD).write_bytes((target / RECORD).read_bytes())
    assert read_record(tmp_path / "other") == {}


@pytest.mark.parametrize("name", [RECORD, CURVE, MODEL])
def test_links_are_replaced_and_not_followed(name: str, target: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    (target / name).unlink()
    (target / name).symlink_to(elsewhere)
    (target / "link").symlink_to(elsewhere)
    save(target, 2)
    assert elsewhere.read_text() == "precious"
    assert not (target / name).is_symlink()
    assert (target / "link").readlink() == elsewhere
    assert read_record(target)["model"] == "2"


def test_the_permissions_of_the_folder_stay(target: Path) -> None:
    target.chmod(0o700)
    save(target, 2)
    assert stat.S_IMODE(target.stat().st_mode) == 0o700


def test_what_cannot_come_along_is_refused(target: Path) -> None:
    os.mkfifo(target / "pipe")
    with pytest.raises(AdapterError, match="pipe: is neither a file nor a link"):
        save(target, 2)
    assert tokens(target) == 1
    assert beside(target) == []


def test_the_working_directory_is_refused(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(target)
    for name in (".", target, "../an adapter [1]"):
        with pytest.raises(AdapterError, match="is the working directory"):
            save(Path(name), 2)
    assert tokens(target) == 1


def test_two_dots_are_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(AdapterError, match="a: holds 'b' and is no adapter"):
        save(tmp_path / "a" / "b" / "..", 2)


def test_a_target_that_cannot_be_looked_into(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(AdapterError, match=r"an adapter \[1\]: cannot be read: Permission denied"):
        check_target(target)


def leftover(target: Path, number: int, tokens: int, age: int, damage: bool = False) -> Path:
    """What a writer has left that died between its two renames."""
    folder = target.with_name(f".{target.name}.replaced-{number:08x}")
    save(folder, tokens)
    if damage:
        (folder / MODEL).write_bytes(b"")
    os.utime(folder, (1e9 - age, 1e9 - age))
    return folder


@pytest.mark.parametrize("how", ["read", "save"])
def test_the_newest_whole_leftover_is_recovered(how: str, tmp_path: Path) -> None:
    target = tmp_path / "an adapter [1]"
    leftover(target, 9, 1, age=3)
    leftover(target, 1, 2, age=2)
    leftover(target, 2, 4, age=1, damage=True)
    (tmp_path / f".{target.name}.replaced-ffffffff").mkdir()
    leftover(tmp_path / "an adapter 1", 1, 5, age=0)  # what the name would match as a pattern
    if how == "read":
        assert tokens(target) == 2
        assert read_record(target)["model"] == "2"
    save(target, 3)
    assert tokens(target) == 3
    assert beside(target) == [".an adapter 1.replaced-00000001"]


def test_what_a_living_writer_works_in_is_left_alone(target: Path) -> None:
    mine = target.with_name(f".{target.name}.writing-00000001")
    mine.mkdir()
    with replace._locked(mine) as is_locked:
        assert is_locked
        save(target, 2)
        assert beside(target) == [mine.name]
    save(target, 2)
    assert beside(target) == []


def test_without_locks_nothing_is_taken_for_left_over(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does anything wait."""
    mine = target.with_name(f".{target.name}.writing-00000001")
    mine.mkdir()

    def flock(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    for exchange in (replace.exchange, lambda first, second: False):
        monkeypatch.setattr(replace, "exchange", exchange)
        save(target, 2)
        assert tokens(target) == 2
        assert beside(target) == [mine.name]
    target.rename(target.with_name(f".{target.name}.replaced-00000002"))
    with pytest.raises(AdapterError, match="no such folder"):
        read_adapter(target)
