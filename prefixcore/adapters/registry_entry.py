"""One folder of a registry: what its files say, and what is wrong with it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from .errors import AdapterError
from .files import find_adapter
from .manifest import Manifest
from .reading import read_adapter, read_header

_LINK = "a link, and no folder of its own; it is not followed: prefixcore add copies what it leads to"


_SCORES = ("exact_match", "accuracy", "f1")
"""Metrics that are shown before others, the first that there is."""


@dataclass(frozen=True)
class Entry:
    """One folder of a registry.

    Attributes:
        name: the folder's.
        path: the folder.
        digest: as of `adapter_digest`; None of a damaged one.
        manifest: None of a damaged one, and of one that PEFT wrote.
        method: what `Manifest.method` says, also of one that PEFT wrote; None of a damaged one.
        size: bytes of all its files.
        date: when it was written, in UTC; None: not known.
        score: a held-out metric: exact match, accuracy or F1, else the first by its name; None: there is none.
        metric: the name of that metric.
        problem: in words, what is wrong with it; None: nothing was seen.

    Examples:
        >>> from prefixcore.adapters import Registry
        >>> with prefixcore.attach(model, prefixcore.PromptTuningConfig(num_virtual_tokens=4)) as handle:
        ...     _ = handle.save("adapters/capitals", task="country -> capital")
        >>> entry = Registry("adapters").find("capitals")
        >>> entry.method, entry.problem
        ('prompt', None)
    """

    name: str
    path: Path
    digest: str | None = None
    manifest: Manifest | None = None
    method: str | None = None
    size: int = 0
    date: str | None = None
    score: float | None = None
    metric: str | None = None
    problem: str | None = None

    @property
    def task(self) -> str | None:
        """The one task, in words."""
        return None if self.manifest is None else self.manifest.task

    @property
    def base_model(self) -> str | None:
        """The name of the base model, else its class."""
        facts: dict[str, Any] = {} if self.manifest is None else self.manifest.base_model
        name = facts.get("name_or_path") or facts.get("class")
        return None if name is None else str(name)


def is_entry_name(name: Any) -> TypeGuard[str]:
    """Whether an entry may have this name: a folder's in the registry, and no path that leads elsewhere."""
    if not isinstance(name, str) or not name or name.startswith(".") or {"/", "\\", "\0"} & set(name):
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half of a character, as JSON can hold it
        return False
    return True


def read_entry(path: Path, whole: bool) -> Entry | None:
    try:
        if not os.path.lexists(path):
            return None
        if path.is_symlink():
            return Entry(path.name, path, problem=_LINK)
        if not path.is_dir():
            return Entry(path.name, path, problem="is not a folder")
        files = [e for e in os.scandir(find_adapter(path)) if e.is_file(follow_symlinks=False)]
        size = sum(e.stat(follow_symlinks=False).st_size for e in files)
        header, digest = read_header(path)
        if whole:
            digest = read_adapter(path).digest or digest
    except AdapterError as error:
        return Entry(path.name, path, problem=_short(str(error), path)) if os.path.lexists(path) else None
    except OSError as error:
        return Entry(path.name, path, problem=f"cannot be read: {error.strerror or error}")
    manifest = header.manifest
    metrics = (manifest.metrics if manifest else None) or {}
    metric = next((name for name in _SCORES if name in metrics), min(metrics, default=None))
    return Entry(
        name=path.name,
        path=path,
        digest=digest,
        manifest=manifest,
        method=header.config.method,
        size=size,
        date=manifest.date if manifest else None,
        score=metrics.get(metric) if metric is not None else None,
        metric=metric,
    )


def may_be_adapter(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link that may lead to one; a file beside the adapters, a README say, is none."""
    return entry.is_symlink() or entry.is_dir(follow_symlinks=False)


def stamp(path: Path) -> object:
    """What changes when a file of an adapter's folder does, or of the checkpoint that it is in."""
    try:
        found = []
        for folder in dict.fromkeys((path, find_adapter(path))):
            with os.scandir(folder) as listing:
                files = [(e.path, e.stat(follow_symlinks=False)) for e in listing]
            found.append((str(folder), folder.stat().st_ino, 0, 0, 0))
            found += [(name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in files]
        return sorted(found)
    except (OSError, AdapterError):
        return None


def _short(problem: str, path: Path) -> str:
    """The message without the folder's path, which the entry has."""
    return problem.removeprefix(f"{path}: ").replace(f"{path}{os.sep}", "")
