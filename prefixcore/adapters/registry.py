"""A folder of adapters is a registry: what a server is given, with one adapter for one task of one base model."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import AdapterError, shown
from .files import MANIFEST_FILE, PEFT_FILE, find_adapter
from .folder import read_folder
from .hub import last_name, local_folder
from .manifest import Manifest
from .module import Adapter
from .provenance import now
from .reading import read_adapter
from .registry_entry import Entry, is_entry_name, may_be_adapter, read_entry, stamp
from .registry_log import Event, Log, Replaced
from .replace import replace_folder
from .same_model import find_differences
from .storage import check_path, naming_errors_of, open_file
from .writing import check_outside, check_target

_NO_FOLDER = "{}: no such folder; expected a folder of adapters"

LONGEST_NAME = 52
"""Characters of a name that `add` gives: what a request to a server can name."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Registry:
    """The adapters in a folder.

    Any adapter's folder in it is an entry, whoever put it there; `add` puts one there as a whole, keeps two from doing
    one task for one base model, and writes down what it replaced. Writers in several processes wait for each other;
    readers never wait.

    Args:
        directory: the folder; `add` makes it where there is none.

    Raises:
        AdapterError: the directory is a file, or itself an adapter.

    Examples:
        >>> from prefixcore.adapters import Registry
        >>> with prefixcore.attach(model, prefixcore.PromptTuningConfig(num_virtual_tokens=4)) as handle:
        ...     folder = handle.save("prompt", task="country -> capital")
        >>> registry = Registry("adapters")
        >>> registry.add(folder, name="capitals").name
        'capitals'
        >>> [entry.name for entry in registry.entries()]
        ['capitals']
        >>> registry.remove("capitals")
        >>> [event.action for event in registry.history()]
        ['add', 'remove']
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        check_path(self.directory)
        self._log = Log(self.directory)
        self._seen: dict[str, tuple[object, Entry]] = {}
        try:
            mode = self.directory.stat().st_mode
        except FileNotFoundError:
            if os.path.lexists(self.directory):
                raise AdapterError(f"{self.directory}: a link to nothing; expected a folder of adapters") from None
            return
        except OSError as error:
            raise AdapterError(f"{self.directory}: cannot be read: {error.strerror or error}") from error
        if not stat.S_ISDIR(mode):
            raise AdapterError(f"{self.directory}: is not a folder; expected a folder of adapters")
        for name in (MANIFEST_FILE, PEFT_FILE):
            if os.path.lexists(self.directory / name):
                raise AdapterError(
                    f"{self.directory}: is itself an adapter; expected the folder that it lies in "
                    "(of `prefixcore add`, the adapter comes first)"
                )

    def entries(self, *, whole: bool = False) -> list[Entry]:
        """All folders in it, sorted by name; one that is damaged, or no adapter, has a `problem`.

        Args:
            whole: True: every number of every adapter is read and checked. False: what the JSON files and the headers
                say; so it is quick, and quicker the second time, as only what has changed is read.

        Raises:
            AdapterError: no such folder, or one that cannot be read.
        """
        try:
            with os.scandir(self.directory) as listing:
                found = sorted(e.name for e in listing if not e.name.startswith(".") and may_be_adapter(e))
        except FileNotFoundError:
            raise AdapterError(_NO_FOLDER.format(self.directory)) from None
        except OSError as error:
            raise AdapterError(f"{self.directory}: cannot be read: {error.strerror or error}") from error
        read = [self._read(name, whole) for name in found]
        return [entry for entry in read if entry is not None]

    def find(self, name: str) -> Entry:
        """The entry of this name, which may have a `problem`.

        Raises:
            AdapterError: there is none; the message lists those that there are.
        """
        entry = self._read(name, False) if is_entry_name(name) else None
        if entry is None:
            names = [each.name for each in self.entries()] if self.directory.is_dir() else []
            listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            raise AdapterError(f"{self.directory}: no adapter is named {shown(name)}; there are {listed or 'none'}")
        return entry

    def history(self) -> list[Event]:
        """What was added, replaced and removed by `add` and `remove`, the oldest first.

        Raises:
            AdapterError: no such folder.
        """
        if not self.directory.exists():
            raise AdapterError(_NO_FOLDER.format(self.directory))
        return self._log.read(self._is_done)

    def add(self, folder: str | Path, name: str | None = None, replace: bool = False) -> Entry:
        """Copies an adapter into the registry, whole or not at all, after reading all of it.

        Args:
            folder: the adapter; it stays as it is, and its copy has the same digest. Or its name on the Hub, as of
                `prefixcore.adapters.download`.
            name: the entry's; None: that of the one it replaces, else of `folder`.
            replace: whether it may take the place of one that has its name, or its task and base model.

        Returns:
            The new entry, or the one that is there if it has this digest and this name already.

        Raises:
            AdapterError: a damaged adapter; one that names no task; a name that no server can be asked for; one of
                this name, or for this task and base model, is there and `replace` is False, or two are.
            OSError: the file system refused; the registry is as it was.
        """
        named = local_folder(folder)
        source = find_adapter(named)
        own_name = source.absolute().name if named == Path(folder) else last_name(Path(folder).as_posix())
        adapter = read_adapter(source)
        manifest, digest = adapter.manifest, adapter.digest
        if manifest is None or digest is None:
            raise AdapterError(
                f"{source}: was written by PEFT and names no task and no base model: prefixcore.load it and save it "
                "with handle.save(folder, task=...)"
            )
        if not (manifest.task or "").strip():
            raise AdapterError(
                f"{source}: names no task, so nobody can tell whether two adapters do the same: load it and save it "
                "with handle.save(folder, task=...), or train it with --task"
            )
        if name is not None:
            _check_name(name)
        files = _contents(source)
        check_outside(self.directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise AdapterError(f"{self.directory}: is not a folder; expected a folder of adapters") from None
        with naming_errors_of(self.directory), self._log.locked(self._is_done, self._finish):
            taken = self._conflicts(manifest, name, own_name)
            given = name or self._same_task(manifest, taken) or own_name
            _check_name(given)
            if len(taken) == 1 and (taken[0].name, taken[0].digest) == (given, digest) and not taken[0].problem:
                return taken[0]
            if taken and not replace:
                raise AdapterError(f"{self.directory}: {_why_not(taken[0], manifest, given)}")
            if len(taken) > 1:
                both = " and ".join(entry.name for entry in taken)
                raise AdapterError(f"{self.directory}: {given} would replace {both}; remove one of them first")
            replaced = [Replaced(entry.name, entry.digest, entry.date) for entry in taken]
            action = "replace" if replaced else "add"
            event = Event(now(), action, given, digest, manifest.task, replaced)
            self._log.begin(event)
            self._put(given, files, digest)
            self._finish(event)
            self._log.end(event)
        entry = self._read(given, False)
        if entry is None:
            raise AdapterError(f"{self.directory / given}: was removed by another as soon as it was there")
        return entry

    def remove(self, name: str) -> None:
        """Takes an adapter, also a damaged one, out of the registry; the history keeps its digest.

        Raises:
            AdapterError: there is none of this name, or it is a folder of something else.
        """
        self.find(name)
        with self._log.locked(self._is_done, self._finish):
            entry = self.find(name)
            if not entry.path.is_symlink():
                check_target(entry.path.absolute())
            event = Event(now(), "remove", name, None, entry.task, [Replaced(name, entry.digest, entry.date)])
            self._log.begin(event)
            self._log.take_away(name)
            self._log.end(event)

    def _read(self, name: str, whole: bool) -> Entry | None:
        """The entry of this name; None: there is nothing."""
        path = self.directory / name
        key = stamp(path)
        if not whole and key is not None and name in self._seen and self._seen[name][0] == key:
            return self._seen[name][1]
        entry = read_entry(path, whole)
        if entry is not None and key is not None and key == stamp(path):
            self._seen[name] = (key, entry)
        return entry

    def _conflicts(self, manifest: Manifest, name: str | None, default: str) -> list[Entry]:
        """The entries that a new one would take the place of."""
        entries = self.entries()
        same_task = [entry for entry in entries if _is_same_task(manifest, entry.manifest)]
        wanted = name or (same_task[0].name if same_task else default)
        return [entry for entry in entries if entry.name == wanted or entry in same_task]

    def _same_task(self, manifest: Manifest, entries: Sequence[Entry]) -> str | None:
        return next((entry.name for entry in entries if _is_same_task(manifest, entry.manifest)), None)

    def _put(self, name: str, files: dict[str, bytes], digest: str) -> None:
        def check(folder: Path) -> None:
            copied: Adapter = read_folder(folder)
            if folder.name.startswith(f".{name}.writing-") and copied.digest != digest:
                raise AdapterError(f"{folder}: the adapter was changed while it was copied; add it again")

        target = self.directory.absolute() / name
        check_target(target)
        replace_folder(target, dict(files), check=check, keep=lambda entry: False)

    def _is_done(self, event: Event) -> bool:
        """Whether what was begun has its effect on the folders."""
        entry = read_entry(self.directory / event.name, False)
        return entry is None if event.action == "remove" else entry is not None and entry.digest == event.digest

    def _finish(self, event: Event) -> None:
        """Takes away what an added adapter replaces under another name."""
        for old in event.replaced:
            if old.name == event.name:
                continue
            entry = read_entry(self.directory / old.name, False)
            if entry is not None and entry.digest == old.digest:
                self._log.take_away(old.name)


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file of an adapter's folder; a link to a file, as a cache of downloads has them, becomes the file."""
    files = {}
    try:
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                raise AdapterError(f"{path}: an adapter has no subfolders, so {folder} is not added")
            file = open_file(path)
            if file is not None:
                with file:
                    files[path.name] = file.readall()
    except OSError as error:
        raise AdapterError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from error
    return files


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or len(name) > LONGEST_NAME or _NAME.fullmatch(name) is None:
        raise AdapterError(
            f"name: expected at most {LONGEST_NAME} letters, digits, '.', '_' and '-', a letter or digit first, as a "
            f"request to a server can hold it, got {shown(name)}; give another name"
        )


def _is_same_task(one: Manifest, other: Manifest | None) -> bool:
    if other is None or other.task is None or one.task is None or _words(one.task) != _words(other.task):
        return False
    return not find_differences(one.base_model, other.base_model).differences


def _words(text: str) -> list[str]:
    return text.casefold().split()


def _why_not(entry: Entry, manifest: Manifest, name: str) -> str:
    known = "damaged" if entry.digest is None else f"digest {entry.digest[:12]}, {entry.date or 'of no known date'}"
    if _is_same_task(manifest, entry.manifest):
        return (
            f"{entry.name} ({known}) does this task for this base model already: {shown(manifest.task)}; pass "
            "replace=True (--replace) to put the new one in its place"
        )
    return (
        f"{name} is there already ({known}, task {shown(entry.task)}); give another name, or pass replace=True "
        "(--replace)"
    )
