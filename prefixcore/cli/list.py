"""List the adapters of a registry, which is a folder of adapters: task, base model, score, digest, date."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import FOUND_WRONG, OK
from .failures import user_errors
from .output import check_open, results, say, table, to_json

if TYPE_CHECKING:
    from ..adapters import Entry
    from ..adapters.registry_log import Event

WIDEST = 40
"""Characters of a cell; what is longer is cut."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prefixcore list`."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder of adapters")
    parser.add_argument("--json", action="store_true", help="as one JSON list, with whole digests")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--quick", action="store_true", help="read what adapters say of themselves, and not their numbers"
    )
    what.add_argument("--history", action="store_true", help="what was added, replaced and removed, in place of it")


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each folder; exit code 1 if one of them is damaged or no adapter."""
    check_open()
    from ..adapters import AdapterError, Registry

    with user_errors(AdapterError):
        registry = Registry(arguments.directory)
        if arguments.history:
            events = registry.history()
            shown = to_json([dataclasses.asdict(event) for event in events], indent=2)
            results(shown if arguments.json else table(history_rows(events)))
            return OK
        entries = registry.entries(whole=not arguments.quick)
    results(to_json([describe(entry) for entry in entries], indent=2) if arguments.json else table(rows(entries)))
    wrong = [entry for entry in entries if entry.problem]
    for entry in wrong:
        say(f"{entry.name}: {entry.problem}")
    return FOUND_WRONG if wrong else OK


def describe(entry: Entry) -> dict[str, Any]:
    """An entry, as JSON can hold it."""
    manifest = entry.manifest
    return {
        "name": entry.name,
        "path": str(entry.path),
        "task": entry.task,
        "base_model": entry.base_model,
        "method": entry.method,
        "metric": entry.metric,
        "score": entry.score,
        "size": entry.size,
        "digest": entry.digest,
        "date": entry.date,
        "license": manifest.license if manifest else None,
        "problem": entry.problem,
    }


def rows(entries: list[Entry]) -> list[tuple[str, ...]]:
    """A line for each entry, below the names of the columns."""
    found: list[tuple[str, ...]] = [("name", "task", "base model", "method", "score", "size", "digest", "date")]
    for entry in entries:
        if entry.problem:
            found.append((cut(entry.name), "damaged or no adapter, see below", *("-",) * 6))
            continue
        score = "-" if entry.score is None else f"{entry.metric} {entry.score:.3g}"
        cells = (entry.name, entry.task, _short(entry.base_model), entry.method, score, size(entry.size))
        found.append((*(cut(cell or "-") for cell in cells), (entry.digest or "-")[:12], (entry.date or "-")[:10]))
    return found


def history_rows(events: list[Event]) -> list[tuple[str, ...]]:
    """A line for each event, below the names of the columns."""
    found: list[tuple[str, ...]] = [("time", "action", "name", "digest", "in place of")]
    for event in events:
        gone = [
            f"{old.name} {(old.digest or 'damaged')[:12]} of {old.date or 'no known date'}" for old in event.replaced
        ]
        found.append((event.time, event.action, cut(event.name), (event.digest or "-")[:12], "; ".join(gone) or "-"))
    return found


def cut(text: str) -> str:
    """`text`, cut where it is too long for a column."""
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def size(count: int) -> str:
    """Bytes in the unit that a person reads them in."""
    units = ("bytes", "kB", "MB", "GB")
    amount, unit = float(count), 0
    while amount >= 1000 and unit < len(units) - 1:
        amount, unit = amount / 1000, unit + 1
    return f"{count} bytes" if unit == 0 else f"{amount:.3g} {units[unit]}"


def _short(base_model: str | None) -> str | None:
    """A folder by its last part; a model's id, `owner/name`, as it is. `--json` has the whole."""
    return base_model if base_model is None or base_model.count("/") < 2 else base_model.rstrip("/").rpartition("/")[2]
