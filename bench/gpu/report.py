"""Prints what `make gpu` measured as tables, with each goal: ``python -m bench.gpu.report FILE.json ...``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def line(info: dict[str, Any]) -> list[str]:
    """A row: what was measured, milliseconds, each ratio or share with its goal, and what else there is to know."""
    case = ", ".join(f"{key} {value}" for key, value in info["case"].items())
    cells = [case, f"{1e3 * info['seconds']['candidate']['min']:.3f}"]
    goals = info["goals"] if info["real"] else {}
    for reference, ratio in info["ratios"].items():
        cells.append(verdict(f"over {reference}", ratio["of_minima"], at_most=goals.get(reference)))
    if "share_of_copy" in info:
        least = goals.get("copy")
        cells.append(verdict("of a copy's rate", info["share_of_copy"], at_least=least))
    if "peak_over_bare_and_state" in info:
        cells.append(verdict("peak memory over bare + state", info["peak_over_bare_and_state"], goals.get("peak")))
    for which, found in info.get("path", {}).items():
        cells.append(f"{which}: {found}")
    cells.append(f"error {info['relative_error']:.1e}")
    return cells


def verdict(what: str, value: float, at_most: float | None = None, at_least: float | None = None) -> str:
    text = f"{value:.3f} {what}"
    if at_most is not None:
        return f"{text} ({'goal' if value <= at_most else 'MISSED'} <= {at_most:.3f})"
    if at_least is not None:
        return f"{text} ({'goal' if value >= at_least else 'MISSED'} >= {at_least:.2f})"
    return text


def render(benchmarks: Iterable[dict[str, Any]]) -> str:
    tables: dict[str, list[list[str]]] = {}
    devices = set()
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        devices.add(info["device"])
        tables.setdefault(info["table"], []).append(line(info))
    lines = sorted(devices)
    for name, rows in tables.items():
        lines += ["", name, *("  " + " | ".join(row) for row in rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    files = [json.loads(Path(file).read_text(encoding="utf-8")) for file in sys.argv[1:]]
    print(render(benchmark for file in files for benchmark in file["benchmarks"]))
