"""The registry as the scheduler sees it: what an adapter is, read again only when its folder has changed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..adapters import AdapterError
from ..adapters.errors import shown
from ..adapters.files import MANIFEST_FILE, MODEL_FILE, PEFT_FILE
from ..adapters.reading import AdapterHeader, read
from .served_model import ServedModel
from .standin import adapter_digest

_MOST_NAMED = 20


class _Peek(Exception):
    """Carries a header out of a reading that ends before the numbers."""

    def __init__(self, header: AdapterHeader) -> None:
        self.header = header


@dataclass(frozen=True)
class _Known:
    """What was found in a folder: P and the digest of an adapter that can be served, or why it cannot."""

    signature: tuple[object, ...]
    digest: str = ""
    num_virtual_tokens: int = 0
    problem: str = ""


class Catalog:
    """The adapters of a registry that fit a model. It is looked at for each request, with a few calls of `stat`.

    Args:
        directory: the registry.
        model: the model that is served.
    """

    def __init__(self, directory: Path, model: ServedModel) -> None:
        self.directory, self.model = directory, model
        self._known: dict[str, _Known] = {}

    def look_up(self, name: str, digest: str) -> int:
        """P of an adapter that can be served.

        Raises:
            AdapterError: there is none of this name, it has another content than `digest`, is damaged or no prefix,
                or was trained for another model.
        """
        folder = self.directory / name
        if not folder.is_dir():
            self._known.pop(name, None)
            raise AdapterError(f"there is no adapter {name!r} in {self.directory}; there are {self._names()}")
        signature = _signature(folder)
        known = self._known.get(name)
        if known is None or known.signature != signature:
            known = self._known[name] = self._read(folder, signature)
        if known.digest and known.digest != digest:
            raise AdapterError(
                f"the request is for the adapter {name!r} of digest {digest}, but {folder} has {known.digest}: it was "
                "replaced or altered; ask for the digest that it has"
            )
        if known.problem:
            raise AdapterError(known.problem)
        return known.num_virtual_tokens

    def _read(self, folder: Path, signature: tuple[object, ...]) -> _Known:
        digest = ""
        try:
            digest = adapter_digest(folder)
            header = read_header(folder)
            self.model.check(header)
        except AdapterError as error:
            text = str(error)
            return _Known(signature, digest, problem=text if str(folder) in text else f"{folder}: {text}")
        tokens = header.config.num_virtual_tokens
        assert tokens is not None
        return _Known(signature, digest, tokens)

    def _names(self) -> str:
        names = sorted(path.name for path in self.directory.iterdir() if path.is_dir())
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        return ", ".join(map(shown, names[:_MOST_NAMED])) + more or "none"


def read_header(folder: Path) -> AdapterHeader:
    """What an adapter's folder claims, checked, and none of its numbers.

    Raises:
        AdapterError: as of `read_adapter`.
    """

    def stop(header: AdapterHeader) -> None:
        raise _Peek(header)

    try:
        read(folder, fits=stop)
    except _Peek as peek:
        return peek.header
    raise AssertionError("reading asks whether the header fits")


def _signature(folder: Path) -> tuple[object, ...]:
    """What changes when the folder is replaced or one of its files is written."""
    found: list[object] = []
    for path in (folder, *(folder / name for name in (MANIFEST_FILE, PEFT_FILE, MODEL_FILE))):
        try:
            status = os.stat(path)
        except OSError as error:
            found.append(error.errno)
        else:
            found.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(found)
