"""The adapters that a front serves: found by name, checked once, and again when their folder has changed."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..adapters import AdapterError, adapter_digest
from ..adapters.reading import AdapterHeader, read
from ..adapters.replace import identity
from ..nn import PrefixTuningConfig
from .openai_errors import Refusal
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
    """

    name: str
    digest: str
    num_virtual_tokens: int
    task: str | None = None
    created: int = 0


class AdapterProblem(AdapterError):
    """An adapter that is there and cannot be served; the message says why and how to mend it."""


class BaseModel(Protocol):
    """The model that is served, as far as an adapter must fit it."""

    def check(self, header: AdapterHeader) -> object:
        """Raises AdapterError unless the adapter is for this model."""


def check_served(folder: Path, name: str, model: BaseModel | None) -> Served:
    """Reads an adapter whole and says what is served of it.

    Args:
        folder: the adapter's.
        name: in the registry.
        model: what it has to fit; None: that is not asked here.

    Raises:
        AdapterProblem: it is a link, damaged, a soft prompt, of another base model, or has a name that cannot stand in
            a salt.
    """

    def fits(header: AdapterHeader) -> None:
        if not isinstance(header.config, PrefixTuningConfig):
            raise AdapterProblem(
                f"it is a soft prompt (method {header.config.method!r}), and a prefix is what is served; make one of "
                f"it and put it in its place: prefixcore bake {folder} --model MODEL --out NEW, then "
                "prefixcore add NEW DIR --replace"
            )
        if model is not None:
            model.check(header)

    if folder.is_symlink():  # what a registry does not follow, the connector refuses
        raise AdapterProblem(
            f"{folder}: a link, and no folder of its own; it is not followed: prefixcore add copies what it leads to"
        )
    try:
        digest = adapter_digest(folder)
        make_salt(name, digest)
        adapter = read(folder, fits=fits, state=False)
    except AdapterProblem:
        raise
    except (ValueError, OSError) as error:
        raise AdapterProblem(str(error)) from error
    assert adapter.config.num_virtual_tokens is not None
    task = adapter.manifest.task if adapter.manifest else None
    return Served(name, digest, adapter.config.num_virtual_tokens, task, int(folder.stat().st_mtime))


class ServedAdapters:
    """The adapters in a folder, as they are at each request.

    Args:
        directory: the registry.
        model: the model that is served; None: whether an adapter fits it is not asked here.

    Examples:
        >>> from prefixcore.serving.front_adapters import ServedAdapters
        >>> from prefixcore.serving.openai_errors import Refusal
        >>> try:
        ...     ServedAdapters(".").find("rivers")
        ... except Refusal as refusal:
        ...     print(refusal.status)
        404
    """

    def __init__(self, directory: str | Path, model: BaseModel | None = None) -> None:
        self.directory, self.model = Path(directory), model
        self._known: dict[str, tuple[object, Served | AdapterProblem]] = {}
        self._lock = threading.Lock()

    def holds(self, name: object) -> bool:
        """Whether there is a folder of this name, served or not."""
        return isinstance(name, str) and _is_folder_name(name) and (self.directory / name).is_dir()

    def find(self, name: str) -> Served:
        """The adapter of this name.

        Raises:
            Refusal: 404: there is none; 400: it cannot be served.
        """
        if not self.holds(name):
            raise Refusal(f"there is no adapter {name!r}", status=404, param="model", code="model_not_found")
        found = self._look(name)
        if isinstance(found, AdapterProblem):
            # A client is told what is wrong, and not where the server keeps its files.
            why = str(found).replace(f"{self.directory}{os.sep}", "")
            raise Refusal(
                f"the adapter {name!r} cannot be served: {why}", param="model", code="adapter_not_servable"
            ) from found
        return found

    def served(self) -> list[Served]:
        """All that can be served, by name."""
        return [found for _, found in self._all() if isinstance(found, Served)]

    def problems(self) -> dict[str, str]:
        """Why the others cannot be, by name."""
        return {name: str(found) for name, found in self._all() if isinstance(found, AdapterProblem)}

    def _all(self) -> list[tuple[str, Served | AdapterProblem]]:
        try:
            names = sorted(entry.name for entry in os.scandir(self.directory) if entry.is_dir())
        except OSError:  # the folder is gone: nothing is served
            return []
        return [(name, self._look(name)) for name in names if _is_folder_name(name)]

    def _look(self, name: str) -> Served | AdapterProblem:
        state = _state(self.directory / name)
        known = self._known.get(name)
        if known is not None and known[0] == state:
            return known[1]
        with self._lock:  # many requests for one that has just changed read it once
            known = self._known.get(name)
            if known is None or known[0] != state:
                known = self._known[name] = (state, self._read(name))
        return known[1]

    def _read(self, name: str) -> Served | AdapterProblem:
        try:
            return check_served(self.directory / name, name, self.model)
        except AdapterProblem as problem:
            return problem
        except OSError as error:  # it has gone meanwhile
            return AdapterProblem(f"{error.filename}: {error.strerror}")


def _is_folder_name(name: str) -> bool:
    return bool(name) and not name.startswith(".") and name == os.path.basename(name) and "\0" not in name


def _state(folder: Path) -> object:
    """What changes whenever a file in the folder does."""
    files = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                found = entry.stat()
                files.append((entry.name, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    except OSError:
        return None
    return identity(folder), sorted(files)
