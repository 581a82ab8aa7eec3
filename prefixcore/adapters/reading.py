"""Reading an adapter: whole, its header alone, its digest or its record, also while it is being replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from .errors import AdapterError
from .files import find_adapter
from .folder import folder_digest, folder_record, kept_in, read_files, read_folder
from .header import AdapterHeader, Fits
from .module import Adapter
from .record import CURVE, RECORD
from .replace import identity, is_being_replaced, recover

_READS = 100


def read_adapter(directory: str | Path) -> Adapter:
    """Reads an adapter's folder, ours or PEFT's, and checks all of it before anything is returned.

    Nothing is ever unpickled. A folder that is replaced while it is read is read again.

    Raises:
        AdapterError: naming the file and the field that is missing, foreign, truncated, of a wrong shape or type,
            or not finite; or the file that the file system refuses to read.

    Examples:
        >>> from prefixcore.adapters import read_adapter
        >>> with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4)) as handle:
        ...     folder = handle.save("capitals")
        >>> read_adapter(folder).layer_shapes[0]
        LayerShape(num_kv_heads=2, key_dim=16, value_dim=16)
    """
    return _undisturbed(Path(directory), read_folder)


def adapter_digest(directory: str | Path) -> str:
    """The digest of an adapter: the SHA-256 of its manifest, which holds the SHA-256 of every other file.

    It names an adapter wherever it lies, and another one has another. The manifest alone is read, so it is quick:
    `read_adapter` checks that the files are those that it names. Of a folder that PEFT wrote, both files are hashed.

    Raises:
        AdapterError: no adapter, or a manifest that was changed after it was written.

    Examples:
        >>> from prefixcore.adapters import adapter_digest, read_adapter
        >>> with prefixcore.attach(model, prefixcore.PromptTuningConfig(num_virtual_tokens=4)) as handle:
        ...     folder = handle.save("prompt")
        >>> adapter_digest(folder) == read_adapter(folder).digest
        True
        >>> len(adapter_digest(folder))
        64
    """
    return _undisturbed(Path(directory), folder_digest)


class _Enough(Exception):
    """The header that was wanted has been read."""


def read_header(directory: str | Path) -> tuple[AdapterHeader, str]:
    """What an adapter claims, its digest, and none of its numbers: the JSON files, the sizes and the headers fit.

    Raises:
        AdapterError: as of `read_adapter`, but for what only the numbers show.
    """

    def stop(header: AdapterHeader) -> None:
        raise _Enough(header)

    def what(folder: Path) -> tuple[AdapterHeader, str]:
        digest = folder_digest(folder)
        try:
            read_files(folder, stop, False)
        except _Enough as enough:
            header: AdapterHeader = enough.args[0]
            manifest = None if header.manifest is None else replace(header.manifest, digest=digest)
            return replace(header, manifest=manifest), digest
        raise AssertionError("a header was not handed on")

    return _undisturbed(Path(directory), what)


def read(directory: str | Path, *, fits: Fits | None = None, state: bool = True) -> Adapter:
    """`read_adapter` for one that is used at once.

    Args:
        directory: the adapter's folder.
        fits: what refuses an adapter by its header.
        state: False: the training state is checked against its digest, and left out.
    """
    return _undisturbed(Path(directory), lambda folder: read_files(folder, fits, state))


def read_record(directory: str | Path) -> dict[str, Any]:
    """How the adapter in a folder was trained, as `write_adapter` was told; empty where nobody said so.

    Raises:
        AdapterError: no such folder, or the record or the manifest is damaged.

    Examples:
        >>> from prefixcore.adapters import read_record
        >>> with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4)) as handle:
        ...     folder = handle.save("capitals", record={"data": "capitals.jsonl", "held_out": {}})
        >>> read_record(folder)["data"]
        'capitals.jsonl'
    """
    return _undisturbed(Path(directory), folder_record)


def read_kept(directory: Path, digest: str) -> dict[str, bytes | None]:
    """The record of a training and its curve in a folder, if they are of the values with this digest.

    Args:
        directory: an adapter's folder, or nothing.
        digest: of the values' file.

    Returns:
        The contents by the names of both files; None: there is none, or one of other values, or a damaged one.
    """
    try:
        return _undisturbed(directory, lambda folder: kept_in(folder, digest))
    except AdapterError:
        return {RECORD: None, CURVE: None}


T = TypeVar("T")


def _undisturbed(folder: Path, what: Callable[[Path], T]) -> T:
    """What `what` makes of the folder, begun again where the folder was replaced meanwhile."""
    folder = find_adapter(folder)
    failure: AdapterError | None = None
    for _ in range(_READS):
        recover(folder.absolute(), check=read_folder)
        before, failure = identity(folder), None
        try:
            found = what(folder)
        except AdapterError as error:
            failure = error
        except OSError as error:
            failure = AdapterError(f"{error.filename or folder}: cannot be read: {error.strerror or error}")
            failure.__cause__ = error
        if identity(folder) != before or (before is None and is_being_replaced(folder.absolute())):
            continue
        if failure is not None:
            raise failure
        return found
    raise failure or AdapterError(f"{folder}: was replaced again and again while it was read")
