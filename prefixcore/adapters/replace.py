"""Put a folder in place of another, whole or not at all, and clean up after writers that died.

A folder `capitals` is written as `.capitals.writing-<token>` beside it and then exchanged with it in one step
(`exchange`). Where the file system has no such step, the former folder is renamed to `.capitals.replaced-<token>`
for the moment between two renames; `recover` gives it its name back if the writer died in that moment, and waits if
the writer lives.

A writer holds a lock on the folder that it writes, and on the parent for the two renames. Locks go with the process,
so an unlocked folder is left over.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .exchange import exchange
from .storage import write_new

try:
    import fcntl
except ImportError:  # no locks here: nothing is ever taken for left over
    fcntl = None  # type: ignore[assignment]

_TRIES = 100
_PATIENCE = 10.0
"""Seconds to wait for a lock: a hundred times what another writer takes."""


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
        keep: whether an entry of the existing `target` that `files` does not name comes along; asked when it is copied.
    """
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    recover(target, check)
    with _new_folder(target) as new:
        for name, data in files.items():
            if data is not None:
                write_new(new / name, data)
        _take_along(target, new, lambda entry: entry.name not in files and keep(entry), check)
        _sync(new)
        check(new)
        _put_in_place(new, target)
        _sync(parent)
    remove_leftovers(target)


def _take_along(target: Path, new: Path, wanted: Callable[[Path], bool], check: Callable[[Path], object]) -> None:
    """Copies entries of `target`, if it is there, and its mode: all from one folder, also if writers replace it."""
    copied: list[Path] = []
    for _ in range(_TRIES):
        recover(target, check)
        before = identity(target)
        try:
            for entry in target.iterdir():
                if wanted(entry):
                    copied.append(new / entry.name)
                    shutil.copy2(entry, copied[-1], follow_symlinks=False)
            shutil.copymode(target, new)
        except FileNotFoundError:
            if before is not None and identity(target) == before:
                raise
        if identity(target) == before and not (before is None and is_being_replaced(target)):
            return
        while copied:
            copied.pop().unlink(missing_ok=True)


def identity(folder: Path) -> tuple[int, ...] | None:
    """What tells a folder from one that has taken its name; the number of an inode alone may be used again."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def recover(target: Path, check: Callable[[Path], object]) -> None:
    """Gives the former folder its name back if its writer died before the new one had it.

    Of several the newest that passes `check`. Does nothing where `target` exists. Where a writer is between its two
    renames, waits until it is done.
    """
    if os.path.lexists(target) or not _find(target, "replaced"):
        return
    with contextlib.suppress(OSError), _locked(target.parent, wait=_PATIENCE) as is_locked:
        if not is_locked or os.path.lexists(target):  # a writer is at work, or was
            return
        for folder in leftovers(target, "replaced"):
            try:
                check(folder)
            except (ValueError, OSError):
                continue
            with contextlib.suppress(OSError):
                folder.rename(target)
            return


def is_being_replaced(target: Path) -> bool:
    """Whether a `target` that was not there was between a writer's two renames: waits for the writer, and looks."""
    with contextlib.suppress(OSError), _locked(target.parent, wait=_PATIENCE):
        return os.path.lexists(target)
    return False


def remove_leftovers(target: Path) -> None:
    """Deletes what dead writers of `target` have left beside it; nothing while `target` itself is missing."""
    if target.exists():
        for folder in leftovers(target, "writing|replaced"):
            shutil.rmtree(folder, ignore_errors=True)


def leftovers(target: Path, kinds: str) -> Iterator[Path]:
    """Folders beside `target` that a writer made and no living writer works in, the newest first; locked meanwhile."""
    for folder in _find(target, kinds):
        with contextlib.suppress(OSError), _locked(folder) as is_locked:
            if is_locked:
                yield folder


def _find(target: Path, kinds: str) -> list[Path]:
    """Folders beside `target` with a name that its writers give, the newest first."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.({kinds})-[0-9a-f]{{8}}")
    found = []
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # it has gone meanwhile
                if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    found.append((entry.stat(follow_symlinks=False).st_mtime, target.parent / entry.name))
    return [folder for _, folder in sorted(found, reverse=True)]


@contextmanager
def _locked(folder: Path, *, wait: float = 0) -> Iterator[bool]:
    """Locks a folder against other writers for the block, if no other has it within `wait` seconds.

    Yields:
        Whether it is locked; never where the system or the file system has no locks.

    Raises:
        OSError: the folder is gone, or may not be opened.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(descriptor, time.monotonic() + wait)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.001)
        except OSError:  # some file systems have no locks
            return False
        else:
            return True


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """An empty, locked folder beside `target`; what bears its name at the end of the block is deleted."""
    with ExitStack() as stack:
        while True:
            new = target.with_name(f".{target.name}.writing-{secrets.token_hex(4)}")
            new.mkdir()
            stack.callback(shutil.rmtree, new, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                stack.enter_context(_locked(new, wait=_PATIENCE))
            if new.exists():  # else it was taken for left over before it was locked
                break
        yield new


def _put_in_place(new: Path, target: Path) -> None:
    if os.path.lexists(target):
        with contextlib.suppress(FileNotFoundError):  # another writer is between its two renames
            if exchange(new, target):
                return
    with _locked(target.parent, wait=_PATIENCE):
        if not os.path.lexists(target):
            new.rename(target)
            return
        if exchange(new, target):
            return
        old = target.with_name(f".{target.name}.replaced-{secrets.token_hex(4)}")
        target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if new.exists():  # else an interrupt came when the second rename was done
                old.rename(target)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    if os.name != "posix":  # a folder can't be opened elsewhere
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
