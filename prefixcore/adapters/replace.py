"""Put a folder in place of another, whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path


def replace_folder(target: Path, files: Mapping[str, bytes | None], check: Callable[[Path], object]) -> None:
    """Writes `files` into a folder beside `target`, checks it, and puts it in place of `target`.

    Files in an existing `target` that `files` does not name come along. When anything fails before the end,
    `target` is as it was. Should the process die between the two renames, the former folder is whole under the
    name that `left_behind` finds.

    Args:
        target: a folder without subfolders, or nothing yet.
        files: name and contents; None: a file of this name is not to be there.
        check: called with the finished folder before it is put in place; what it raises is passed on.
    """
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    new = parent / f".{target.name}.writing-{token}"
    old = parent / f".{target.name}.replaced-{token}"
    try:
        new.mkdir()
        for name, data in files.items():
            if data is not None:
                _write(new / name, data)
        if target.exists():
            for entry in target.iterdir():
                if entry.name not in files:
                    shutil.copy2(entry, new / entry.name, follow_symlinks=False)
        _sync(new)
        check(new)
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
        _sync(parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def left_behind(target: Path) -> Path | None:
    """A former `target` that a process which died while replacing it has left, or None."""
    found = sorted(target.parent.glob(f".{target.name}.replaced-*"))
    return found[-1] if found else None


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    if os.name != "posix":  # a folder can't be opened elsewhere
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
