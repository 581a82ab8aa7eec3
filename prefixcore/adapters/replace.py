"""Put a folder in place of another, whole or not at all, and clean up after writers that died.

A folder `capitals` is written as `.capitals.writing-<token>` beside it and then exchanged with it in one step
(`exchange`). Where the file system has no such step, the former folder is renamed to `.capitals.replaced-<token>`
for the moment between two renames; `recover` gives it its name back if the writer died in that moment.

A writer holds a lock on the folders it works in. The lock goes with the process, so an unlocked one is left over.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .exchange import exchange

try:
    import fcntl
except ImportError:  # no locks here: nothing is ever taken for left over
    fcntl = None  # type: ignore[assignment]


def replace_folder(
    target: Path,
    files: Mapping[str, bytes | None],
    check: Callable[[Path], object],
    keep: Callable[[Path], bool] = lambda entry: True,
) -> None:
    """Writes `files` into a folder beside `target`, checks it, and puts it in place of `target`.

    A reader sees the former folder or the new one, and so does whoever looks after the process has died at any
    moment. When anything fails before the exchange, `target` is as it was.

    Args:
        target: a folder without subfolders, or nothing yet.
        files: name and contents; None: a file of this name is not to be there.
        check: called with the finished folder before it is put in place, and with a former folder before it is
            recovered; what it raises is passed on.
        keep: whether an entry of the existing `target` that `files` does not name comes along.
    """
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    recover(target, check)
    with _new_folder(target) as new:
        for name, data in files.items():
            if data is not None:
                _write(new / name, data)
        if target.exists():
            for entry in target.iterdir():
                if entry.name not in files and keep(entry):
                    shutil.copy2(entry, new / entry.name, follow_symlinks=False)
        _sync(new)
        check(new)
        _put_in_place(new, target)
        _sync(parent)
    remove_leftovers(target)


def recover(target: Path, check: Callable[[Path], object]) -> None:
    """Gives the former folder its name back if its writer died before the new one had it.

    Of several the newest that passes `check`. Does nothing where `target` exists, or a writer is at work.
    """
    if os.path.lexists(target):
        return
    for folder in _leftovers(target, "replaced"):
        try:
            check(folder)
        except (ValueError, OSError):
            continue
        with contextlib.suppress(OSError):  # somebody else was quicker
            folder.rename(target)
        return


def remove_leftovers(target: Path) -> None:
    """Deletes what dead writers of `target` have left beside it; nothing while `target` itself is missing."""
    if target.exists():
        for folder in _leftovers(target, "writing|replaced"):
            shutil.rmtree(folder, ignore_errors=True)


def _leftovers(target: Path, kinds: str) -> Iterator[Path]:
    """Folders beside `target` that a writer made and no living writer works in, the newest first; locked meanwhile."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.({kinds})-[0-9a-f]{{8}}")
    found = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(target.parent):
            if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                found.append((entry.stat(follow_symlinks=False).st_mtime, target.parent / entry.name))
    for _, folder in sorted(found, reverse=True):
        with contextlib.suppress(OSError), _locked(folder, wait=False):
            yield folder


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Locks a folder against other writers for the block.

    Raises:
        OSError: the folder is gone; without `wait` also: a writer has it, or there are no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError) if wait else contextlib.nullcontext():  # some file systems have none
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        elif not wait:
            raise OSError("no locks")
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """An empty, locked folder beside `target`; what bears its name at the end of the block is deleted."""
    with ExitStack() as stack:
        while True:
            new = target.with_name(f".{target.name}.writing-{secrets.token_hex(4)}")
            new.mkdir()
            stack.callback(shutil.rmtree, new, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                stack.enter_context(_locked(new, wait=True))
            if new.exists():  # else it was taken for left over before it was locked
                break
        yield new


def _put_in_place(new: Path, target: Path) -> None:
    if not target.exists():
        with contextlib.suppress(OSError):  # another writer was quicker
            new.rename(target)
            return
    if exchange(new, target):
        return
    old = target.with_name(f".{target.name}.replaced-{secrets.token_hex(4)}")
    with _locked(target, wait=True):
        target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)


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
