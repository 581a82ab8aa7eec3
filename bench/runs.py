"""Results on disk: one JSON file a run in bench/results/, and the runs of one machine put together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
FORMAT = 1
DIGITS = 5  # significant ones: more is noise
MACHINE = ("cpu", "cores", "memory_gib", "threads", "isa", "torch_isa", "system")


def rounded(value: Any) -> Any:
    """The same with floats cut to `DIGITS` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: rounded(x) for key, x in value.items()}
    return [rounded(x) for x in value] if isinstance(value, list) else value


def trimmed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of pytest-benchmark's JSON: the stamp, and every benchmark's own figures."""
    benchmarks = [{"id": b["fullname"], **rounded(b["extra_info"])} for b in raw["benchmarks"]]
    return {
        "format": FORMAT,
        "stamp": {"time": raw["datetime"][:16], **raw["machine_info"]["prefixcore"]},
        "benchmarks": benchmarks,
    }


def read(path: Path) -> dict[str, Any]:
    """A run, from pytest-benchmark's file or from one of ours."""
    content = json.loads(path.read_text(encoding="utf-8"))
    run = trimmed(content) if "machine_info" in content else content
    if run.get("format") != FORMAT:
        raise ValueError(f"{path}: expected results of format {FORMAT}, got {run.get('format')!r}; measure anew")
    return run


def write(run: Mapping[str, Any], path: Path) -> None:
    """One benchmark a line, so that a later run differs in what differs."""
    lines = ",\n".join("  " + json.dumps(b) for b in run["benchmarks"])
    head = f'{{\n"format": {run["format"]},\n"stamp": {json.dumps(run["stamp"])},\n"benchmarks": [\n'
    path.write_text(f"{head}{lines}\n]\n}}\n", encoding="utf-8")


def kept(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The runs that are kept, in the order of their names."""
    return [read(path) for path in sorted(folder.glob("*.json"))]


@dataclass
class Row:
    """One case, measured in one run or several."""

    case: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def references(self) -> list[str]:
        return list(self.runs[0].get("ratios", ()))

    def worst(self, reference: str) -> float:
        """Our time over the reference's, of the minima; of several runs the greatest."""
        return max(run["ratios"][reference]["of_minima"] for run in self.runs)

    def spread(self, reference: str) -> tuple[float, float]:
        """Between which the middle half of the rounds' own ratios lies; over all runs."""
        ratios = [run["ratios"][reference] for run in self.runs]
        return min(r["low"] for r in ratios), max(r["high"] for r in ratios)

    def over(self, one: str, other: str) -> float:
        """Any two of the timed: ratio of the minima; of several runs the greatest."""
        return max(run["seconds"][one]["min"] / run["seconds"][other]["min"] for run in self.runs)

    def seconds(self, name: str = "candidate") -> float:
        """The least that a call took; of several runs the greatest."""
        return max(run["seconds"][name]["min"] for run in self.runs)

    def bytes(self, name: str) -> int:
        return max(run["bytes"][name] for run in self.runs)


@dataclass
class Machine:
    """All runs on one machine with one setting of threads and instruction sets."""

    stamps: list[dict[str, Any]]
    tables: dict[str, list[Row]]

    @property
    def slug(self) -> str:
        stamp = self.stamps[0]
        return f"{stamp['isa']}-{stamp['threads']}-threads"


def machines(runs: Iterable[Mapping[str, Any]]) -> list[Machine]:
    """The runs put together by machine; a smoke run is refused, since its times mean nothing."""
    found: dict[tuple[Any, ...], Machine] = {}
    for run in runs:
        if run["stamp"]["scale"] == "smoke":
            raise ValueError("these are results of a smoke run, whose times mean nothing: measure with quick or full")
        machine = found.setdefault(tuple(run["stamp"][name] for name in MACHINE), Machine([], {}))
        machine.stamps.append(dict(run["stamp"]))
        for benchmark in run["benchmarks"]:
            rows = machine.tables.setdefault(benchmark["table"], [])
            row = next((row for row in rows if row.case == benchmark["case"]), None)
            if row is None:
                rows.append(row := Row(benchmark["case"]))
            row.runs.append(benchmark)
    slugs = [machine.slug for machine in found.values()]
    if len(set(slugs)) < len(slugs):
        raise ValueError(f"results of different machines with one name {slugs}: keep one machine's in bench/results/")
    return list(found.values())
