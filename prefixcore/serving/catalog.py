"""The registry as the scheduler sees it: whether an adapter that a request names can be served, at that moment."""

from __future__ import annotations

from pathlib import Path

from ..adapters import AdapterError, Registry
from ..adapters.reading import read_header
from .served_model import ServedModel


class Catalog:
    """The adapters of a registry that fit a model. It is looked at for each request, with a few calls of `stat`.

    Args:
        directory: the registry.
        model: the model that is served.
    """

    def __init__(self, directory: Path, model: ServedModel) -> None:
        self.registry, self.model = Registry(directory), model
        self._fits: dict[str, int | str] = {}
        """By digest: P of an adapter that fits the model, or why it does not."""

    def look_up(self, name: str, digest: str) -> int:
        """P of an adapter that can be served.

        Raises:
            AdapterError: there is none of this name, it has another content than `digest`, is damaged or no prefix,
                or was trained for another model.
        """
        entry = self.registry.find(name)
        if entry.problem is not None:
            raise AdapterError(f"{entry.path}: {entry.problem}")
        if entry.digest != digest:
            raise _replaced(entry.path, digest, entry.digest)
        if digest not in self._fits:
            self._fits[digest] = self._check(entry.path, digest)
        found = self._fits[digest]
        if isinstance(found, str):
            raise AdapterError(f"{entry.path}: {found}")
        return found

    def _check(self, folder: Path, digest: str) -> int | str:
        header, found = read_header(folder)
        if found != digest:
            raise _replaced(folder, digest, found)
        try:
            self.model.check(header)
        except AdapterError as error:
            return str(error)
        tokens = header.config.num_virtual_tokens
        assert tokens is not None
        return tokens


def _replaced(folder: Path, wanted: str, found: str | None) -> AdapterError:
    return AdapterError(
        f"{folder}: the request is for the digest {wanted}, and the adapter has {found}: it was replaced or altered; "
        "ask for the digest that it has"
    )
