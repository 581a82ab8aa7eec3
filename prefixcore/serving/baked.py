"""Prefixes that stand in for what a registry holds and a server cannot take: each baked once, in a folder of its own.

A baked prefix lies in `BAKED/DIGEST`, after the digest of what it was baked from, which its manifest names too. So a
second start bakes nothing again, and what is put in the place of an adapter never meets the prefix of the former one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..adapters import AdapterError, Entry, Registry, check_target, read_adapter


def baked_folder(adapters: Path) -> Path:
    """Where the prefixes of a registry are baked to unless another folder is given: beside it.

    Examples:
        >>> from pathlib import Path
        >>> from prefixcore.serving.baked import baked_folder
        >>> baked_folder(Path("adapters")).name
        'adapters.baked'
    """
    absolute = adapters.absolute()
    return absolute.with_name(f"{absolute.name}.baked")


def needs_baking(entry: Entry) -> bool:
    """Whether an entry is sound, and not what a server takes."""
    if entry.problem is not None or entry.digest is None:
        return False
    config = {} if entry.manifest is None else entry.manifest.config
    return entry.method != "prefix" or config.get("position_offset") is False


def find_baked(baked: Registry, entry: Entry) -> Entry | None:
    """The prefix that was baked from an entry, which may have a problem; None: there is none.

    Args:
        baked: the folder of baked prefixes.
        entry: of the registry.
    """
    if not needs_baking(entry) or not os.path.isdir(baked.directory / str(entry.digest)):
        return None
    found = baked.find(str(entry.digest))
    return found if found.problem is not None or _origin(found) == entry.digest else None


def bake_registry(
    registry: Registry,
    baked: Path,
    open_model: Callable[[], Any],
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, str]:
    """Bakes what a registry holds and a server cannot take, unless it was baked before; the registry is only read.

    Args:
        registry: the adapters.
        baked: where the prefixes go; it is made where there is none.
        open_model: opens the base model; called once, and only where there is something to bake.
        say: told what is done.

    Returns:
        Why an adapter could not be baked, by its name.

    Raises:
        AdapterError: `baked` is a file, an adapter, or in the registry.
        OSError: it cannot be written.
    """
    from ..hf import bake

    place = registry.directory.resolve()
    if place in (baked.resolve(), *baked.resolve().parents):
        raise AdapterError(f"{baked}: lies in the registry, which stays as it is; give a folder outside of it")
    there = Registry(baked)
    waiting = [entry for entry in registry.entries() if needs_baking(entry) and not _is_baked(there, entry)]
    if not waiting:
        return {}
    for entry in waiting:
        check_target((baked / str(entry.digest)).absolute())
    baked.mkdir(parents=True, exist_ok=True)
    model, problems = open_model(), {}
    for number, entry in enumerate(waiting, start=1):
        say(f"baking {entry.name}, {number} of {len(waiting)}")
        try:
            say(str(bake(model, entry.path, baked / str(entry.digest))))
        except (ValueError, TypeError, NotImplementedError) as error:  # what `bake` says of it, in words
            problems[entry.name] = f"cannot be baked: {error}"
    return problems


def _is_baked(there: Registry, entry: Entry) -> bool:
    """Whether there is a prefix of an entry, every number of which can be read."""
    found = find_baked(there, entry)
    if found is None or found.problem is not None:
        return False
    try:
        read_adapter(found.path)
    except AdapterError:
        return False
    return True


def _origin(entry: Entry) -> object:
    """The digest of what an adapter was baked from, as `bake` has written it into its manifest."""
    training = None if entry.manifest is None else entry.manifest.training
    return (training or {}).get("baked_digest")
