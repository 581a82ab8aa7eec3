"""Copy an adapter into a registry, which is a folder of adapters, one for each task and base model."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import _interrupt
from .common import ADAPTER, OK, adapter_name
from .failures import user_errors
from .output import check_open, results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prefixcore add`."""
    parser.add_argument("adapter", type=adapter_name, metavar="ADAPTER", help=f"{ADAPTER}; it stays as it is")
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder of adapters; made where there is none")
    parser.add_argument(
        "--name", metavar="NAME", help="what it is asked for by (default: that of the one it replaces, else ADAPTER's)"
    )
    parser.add_argument(
        "--replace", action="store_true", help="take the place of one of this name, or for this task and base model"
    )


def run(arguments: argparse.Namespace) -> int:
    """Read the whole adapter, copy it, and say what it took the place of."""
    check_open()
    from ..adapters import AdapterError, Registry

    with user_errors(AdapterError):
        registry = Registry(arguments.directory)
        _interrupt.tell(f"{arguments.directory} is as it was before, or holds the new adapter, whole", at_once=False)
        try:
            entry = registry.add(arguments.adapter, name=arguments.name, replace=arguments.replace)
        except AdapterError:
            _interrupt.tell(_interrupt.NOTHING)
            raise
        _interrupt.tell(f"the adapter is in {entry.path}")
        last = [event for event in registry.history() if event.name == entry.name][-1:]
    replaced = last[0].replaced if last and last[0].digest == entry.digest else []
    lines = [f"{entry.path}  task {entry.task!r}, digest {entry.digest}"]
    for old in replaced:
        lines.append(
            f"in place of {old.name}, digest {old.digest or 'unknown (damaged)'}, of {old.date or 'no known date'}"
        )
    results("\n".join(lines))
    return OK
