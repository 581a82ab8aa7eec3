"""The registry as a server sees it: what is served of it, at the moment of each request."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ..adapters import AdapterError, Entry, Registry
from ..adapters.header import AdapterHeader
from ..adapters.reading import read, read_header
from ..adapters.registry_entry import is_entry_name
from .baked import find_baked
from .salt import make_salt


@dataclass(frozen=True)
class Served:
    """An adapter that is served.

    Attributes:
        name: its folder's name in the registry.
        digest: of its content.
        num_virtual_tokens: P.
        task: what it does, in a person's words.
        created: when its folder was written, in seconds since 1970.
        folder: where the prefix lies.
        baked_from: the digest of what stands in the registry, where the prefix was baked from that.
    """

    name: str
    digest: str
    num_virtual_tokens: int
    task: str | None = None
    created: int = 0
    folder: Path = Path()
    baked_from: str | None = None


class BaseModel(Protocol):
    """The model that is served, as far as an adapter must fit it."""

    def check(self, header: AdapterHeader) -> object:
        """Raises AdapterError unless the adapter is for this model."""


@dataclass(frozen=True)
class _Checked:
    """What was found out of an entry, which the registry hands out anew when anything in its folder has changed."""

    entry: Entry
    is_whole: bool
    found: Served | AdapterError


class Catalog:
    """The adapters of a registry that can be served.

    What has not changed is looked at with a few calls of `stat`; whatever is put into the folder, replaced or damaged
    is read again at the next request. Threads may share it.

    Args:
        directory: the registry.
        model: the model that is served; None: whether an adapter fits it is not asked here.
        baked: a folder of prefixes that were baked from what the registry holds; None: there is none.

    Attributes:
        no_images: why requests for these adapters may hold no images; None: they may, where the model reads any.

    Raises:
        AdapterError: a directory is a file, or itself an adapter.

    Examples:
        >>> from prefixcore.serving.catalog import Catalog
        >>> with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4)) as handle:
        ...     _ = handle.save("adapters/capitals")
        >>> [(served.name, served.num_virtual_tokens) for served in Catalog("adapters").served()]
        [('capitals', 4)]
    """

    def __init__(self, directory: str | Path, model: BaseModel | None = None, baked: str | Path | None = None) -> None:
        self.registry, self.model = Registry(directory), model
        self.no_images: str | None = getattr(model, "no_images", None)
        self.baked = None if baked is None else Registry(baked)
        self._checked: dict[str, _Checked] = {}
        self._lock = threading.Lock()

    def holds(self, name: object) -> bool:
        """Whether there is a folder of this name, served or not."""
        return is_entry_name(name) and os.path.isdir(self.registry.directory / name)

    def look_up(self, name: str, digest: str) -> Served:
        """The adapter of this name, of which only the header is read, for a request for `digest`.

        Raises:
            AdapterError: there is none, it has another content than `digest`, is damaged or no prefix, or was trained
                for another model.
        """
        found = self.find(name, whole=False)
        if found.digest != digest:
            raise AdapterError(
                f"{found.folder}: the request is for the digest {digest}, and the adapter has {found.digest}: it was "
                "replaced or altered; ask for the digest that it has"
            )
        return found

    def find(self, name: str, *, whole: bool = True) -> Served:
        """The adapter of this name.

        Args:
            name: its folder's.
            whole: whether every number of it has to have been read and checked.

        Raises:
            AdapterError: there is none, or it cannot be served; the message says why and how to mend it.
        """
        given = self.registry.find(name)
        baked = None if self.baked is None else find_baked(self.baked, given)
        entry = baked or given
        if entry.problem is not None:
            raise AdapterError(f"{entry.path}: {entry.problem}")
        known = self._known(name, entry, whole)
        if known is None:
            with self._lock:  # many requests for one that has just changed read it once
                known = self._known(name, entry, whole)
                if known is None:
                    found = self._check(name, entry, whole)
                    if baked is not None and isinstance(found, Served):
                        found = replace(found, baked_from=given.digest)
                    known = self._checked[name] = _Checked(entry, whole, found)
        if isinstance(known.found, AdapterError):
            raise AdapterError(str(known.found))
        return known.found

    def served(self) -> list[Served]:
        """All that can be served, by name."""
        return [found for found in self._all().values() if isinstance(found, Served)]

    def problems(self) -> dict[str, str]:
        """Why the others cannot be, by name."""
        return {name: found for name, found in self._all().items() if isinstance(found, str)}

    def _all(self) -> dict[str, Served | str]:
        try:
            names = [entry.name for entry in self.registry.entries()]
        except AdapterError:  # the folder is gone: nothing is served
            return {}
        return {name: self._found(name) for name in names}

    def _found(self, name: str) -> Served | str:
        try:
            return self.find(name)
        except AdapterError as error:
            return str(error)

    def _known(self, name: str, entry: Entry, whole: bool) -> _Checked | None:
        known = self._checked.get(name)
        if known is None or known.entry is not entry or (whole and not known.is_whole):
            return None
        return known

    def _check(self, name: str, entry: Entry, whole: bool) -> Served | AdapterError:
        def fits(header: AdapterHeader) -> None:
            if header.config.method != "prefix":
                raise AdapterError(_why_no_prefix(entry.path, header.config.method))
            if not getattr(header.config, "position_offset", True):
                raise AdapterError(_why_not_at_zero(entry.path))
            if self.model is not None:
                self.model.check(header)

        try:
            if whole:
                adapter = read(entry.path, fits=fits, state=False)
                config, manifest, digest = adapter.config, adapter.manifest, adapter.digest
            else:
                header, digest = read_header(entry.path)
                fits(header)
                config, manifest = header.config, header.manifest
            make_salt(name, digest or "")
            created = int(entry.path.stat().st_mtime)
        except ValueError as error:
            problem = str(error)
            return AdapterError(problem if problem.startswith(f"{entry.path}") else f"{entry.path}: {problem}")
        except OSError as error:  # it has gone meanwhile
            return AdapterError(f"{entry.path}: cannot be read: {error.strerror or error}")
        assert config.num_virtual_tokens is not None
        assert digest is not None
        task = manifest.task if manifest else None
        return Served(name, digest, config.num_virtual_tokens, task, created, entry.path)


def _why_not_at_zero(folder: Path) -> str:
    return (
        "its text begins at position 0 (position_offset=False), and a server has the prefix's tokens before it, which "
        f"take P positions: prefixcore bake {folder} --model MODEL --out NEW turns its keys, where they are rotary; "
        "then prefixcore add NEW DIR --replace; or start the server with prefixcore serve --bake, which does so"
    )


def _why_no_prefix(folder: Path, method: str) -> str:
    return (
        f"it is a soft prompt (method {method!r}), and a prefix is what is served; make one of it and put it in its "
        f"place: prefixcore bake {folder} --model MODEL --out NEW, then prefixcore add NEW DIR --replace; or start the "
        "server with prefixcore serve --bake, which bakes what is no prefix"
    )
