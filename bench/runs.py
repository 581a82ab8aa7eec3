"""Results on disk: one JSON file of one or more runs in bench/results/, and the runs of one machine put together."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cpus import product

FOLDER = Path(__file__).parent / "results"
FORMAT = 2
DIGITS = 5  # significant ones: more is noise
MACHINE = ("cpu", "cores", "memory_gib", "threads", "isa", "torch_isa", "system")
SITTINGS = (*MACHINE, "scale", "compiler", "versions", "commit")  # what runs kept together have to have in common


def rounded(value: Any) -> Any:
    """The same with floats cut to `DIGITS` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: rounded(x) for key, x in value.items()}
    return [rounded(x) for x in value] if isinstance(value, list) else value


def trimmed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A run: of pytest-benchmark's JSON the stamp, and every benchmark's own figures, or why it was left out."""
    entries = [*raw["benchmarks"], *raw.get("left_out", ())]
    benchmarks = [{"id": b["fullname"], **rounded(b["extra_info"])} for b in entries]
    return {"stamp": {"time": raw["datetime"][:16], **raw["machine_info"]["prefixcore"]}, "benchmarks": benchmarks}


def read(path: Path) -> list[dict[str, Any]]:
    """The run in a file of pytest-benchmark's, or the runs in one of ours.

    Raises:
        ValueError: it is neither; the message names the file, and what it is instead.
    """
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except ValueError as error:
        empty = "an empty file: nothing was measured, or the run was broken off"
        raise ValueError(f"{path}: expected results, got {f'what is no JSON ({error})' if text else empty}") from None
    content = content if isinstance(content, dict) else {}
    if "machine_info" in content:
        named = all("table" in benchmark["extra_info"] for benchmark in content["benchmarks"])
        if not named or "prefixcore" not in content["machine_info"]:
            raise ValueError(f"{path}: expected a run of the benchmarks in bench/, got one of other benchmarks")
        return [trimmed(content)]
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: expected results of format {FORMAT}, got {content.get('format')!r}; measure anew")
    return content["runs"]


def read_all(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The runs in all of these files."""
    return [run for path in paths for run in read(path)]


def write(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One benchmark a line, so that later runs differ in what differs."""
    texts = []
    for run in runs:
        lines = ",\n".join("  " + json.dumps(b) for b in run["benchmarks"])
        texts.append(f'{{"stamp": {json.dumps(run["stamp"])},\n"benchmarks": [\n{lines}\n]}}')
    path.write_text(f'{{"format": {FORMAT}, "runs": [\n' + ",\n".join(texts) + "\n]}\n", encoding="utf-8")


def together(runs: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The same runs, if each of them measured the same things, of the same code in the same place.

    Raises:
        ValueError: they differ, or two are one; the message names in what.
    """
    first = runs[0]
    for place, run in enumerate(runs[1:], start=2):
        for name in SITTINGS:
            if run["stamp"][name] != first["stamp"][name]:
                raise ValueError(
                    f"run {place} differs from run 1 in its {name}: {run['stamp'][name]!r}, not "
                    f"{first['stamp'][name]!r}; keep them in files of their own"
                )
        if differing := {b["id"] for b in run["benchmarks"]} ^ {b["id"] for b in first["benchmarks"]}:
            raise ValueError(
                f"run {place} and run 1 do not hold the same benchmarks; {sorted(differing)[0]} is in one of them only"
            )
    if any(run in runs[:place] for place, run in enumerate(runs)):
        raise ValueError("expected different runs to keep together; one of them is there twice")
    return runs


def kept(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The runs that are kept, in the order of the files' names."""
    return read_all(sorted(folder.glob("*.json")))


@dataclass
class Row:
    """One case, measured in one run or several; in none where `skipped` says why."""

    case: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)
    skipped: str | None = None

    def add(self, benchmark: dict[str, Any]) -> None:
        """Count in what one run says of this case."""
        if reason := benchmark.get("skipped"):
            self.skipped = reason if not self.runs else None
        else:
            self.runs.append(benchmark)
            self.skipped = None

    @property
    def references(self) -> list[str]:
        """What it was timed beside."""
        return self.names("ratios")

    def names(self, figures: str) -> list[str]:
        """What any of the runs has figures of this kind for: a quick run has fewer than a full one."""
        return list(dict.fromkeys(name for run in self.runs for name in run.get(figures, ())))

    def all(self, figures: str, name: str) -> list[Any]:
        """The figures of each run that has them."""
        return [run[figures][name] for run in self.runs if name in run[figures]]

    def worst(self, reference: str) -> float:
        """Our time over the reference's, of the minima; of several runs the greatest."""
        return max(ratio["of_minima"] for ratio in self.all("ratios", reference))

    def spread(self, reference: str) -> tuple[float, float]:
        """Between which the middle half of the rounds' own ratios lies; over all runs."""
        ratios = self.all("ratios", reference)
        return min(r["low"] for r in ratios), max(r["high"] for r in ratios)

    def over(self, one: str, other: str) -> float:
        """Any two of the timed: ratio of the minima; of several runs the greatest."""
        timed = [run["seconds"] for run in self.runs if {one, other} <= set(run["seconds"])]
        return max(seconds[one]["min"] / seconds[other]["min"] for seconds in timed)

    def seconds(self, name: str = "candidate") -> float:
        """The least that a call took; of several runs the greatest."""
        return max(seconds["min"] for seconds in self.all("seconds", name))

    def middle(self, name: str = "candidate") -> float:
        """The least that a call took; of several runs the median. What a picture of growth shows."""
        return statistics.median(seconds["min"] for seconds in self.all("seconds", name))

    def part(self, name: str, part: str) -> float:
        """Milliseconds of a part of a profiled step; of several runs the median."""
        return statistics.median(parts[part] for parts in self.all("milliseconds", name))

    def bytes(self, name: str) -> int:
        """Of several runs the most."""
        return max(self.all("bytes", name))


@dataclass
class Machine:
    """All runs on one machine with one setting of threads and instruction sets."""

    stamps: list[dict[str, Any]]
    tables: dict[str, list[Row]]

    @property
    def name(self) -> str:
        """The CPU's, as people know it."""
        return product(self.stamps[0]["cpu"])

    @property
    def isa(self) -> str:
        """The instruction set of our kernels."""
        return str(self.stamps[0]["isa"])

    @property
    def title(self) -> str:
        """What tells this machine and its settings from the others."""
        return f"{self.name}, {self.isa}, {self.stamps[0]['threads']} threads"

    @property
    def slug(self) -> str:
        """The title as part of a file's name."""
        return re.sub("[^a-z0-9_]+", "-", self.title.lower())

    @property
    def latest(self) -> str:
        """When it was measured last: a date and a time that sort as they follow."""
        return max(stamp["time"] for stamp in self.stamps)

    @property
    def counts(self) -> tuple[int, int]:
        """In how many runs a row was measured: at least and at most."""
        counts = [len(row.runs) for rows in self.tables.values() for row in rows if row.runs]
        return min(counts, default=0), max(counts, default=0)


def machines(runs: Iterable[Mapping[str, Any]]) -> list[Machine]:
    """The runs put together by machine: the one with most tables first, of such one with a full run, of such the one
    measured last. A smoke run is refused, since its times mean nothing."""
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
            row.add(benchmark)
    slugs = [machine.slug for machine in found.values()]
    if len(set(slugs)) < len(slugs):
        raise ValueError(f"results of different machines with one name {slugs}: keep one machine's in bench/results/")

    def weight(machine: Machine) -> tuple[int, bool, str]:
        return len(machine.tables), any(stamp["scale"] == "full" for stamp in machine.stamps), machine.latest

    return sorted(found.values(), key=weight, reverse=True)
