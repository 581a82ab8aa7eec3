"""The GPU's results on disk: what `make gpu` left, cut to what the tables need, in bench/gpu/results/."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
Info = dict[str, Any]


@dataclass
class Session:
    """One run of `make gpu`.

    Attributes:
        name: the file's name in the folder, without `.json`.
        report: what passed, failed and was not run, as `.ci/gpu.py` wrote it.
        commits: of what was measured.
        rows: the figures by the name of their table.
    """

    name: str
    report: dict[str, Any]
    commits: list[str]
    rows: dict[str, list[Info]]

    @property
    def device(self) -> str:
        """GPU, CUDA and cuDNN."""
        return str(next(info["device"] for rows in self.rows.values() for info in rows))

    @property
    def tests(self) -> dict[str, int]:
        """How many device tests there were, and what became of them."""
        return next(step for step in self.report["steps"] if step["step"] == "tests")


def tables(benchmarks: Iterable[Mapping[str, Any]]) -> dict[str, list[Info]]:
    """The figures of pytest-benchmark's `benchmarks` by table."""
    found: dict[str, list[Info]] = {}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        found.setdefault(info["table"], []).append(info)
    return found


def read(path: Path) -> dict[str, Any]:
    """The JSON in `path`."""
    return json.loads(path.read_text(encoding="utf-8"))


def sessions(folder: Path = FOLDER) -> list[Session]:
    """What is kept, in the order of the names."""
    found = []
    for path in sorted(folder.glob("*.json")):
        if "steps" not in (report := read(path)):
            continue
        parts = [read(part) for part in sorted(folder.glob(f"{path.stem}-*.json"))]
        rows = tables(benchmark for part in parts for benchmark in part["benchmarks"])
        found.append(Session(path.stem, report, sorted({part["commit"] for part in parts}), rows))
    return found


def keep(out: Path, name: str, folder: Path = FOLDER) -> Sequence[Path]:
    """Write what `make gpu OUT=out` left into `folder`, in the place of what is there by that name.

    Raises:
        ValueError: it was a rehearsal, or there are no figures.
    """
    report, parts = read(out / "gpu.json"), sorted(out.glob("bench-*.json"))
    if report["rehearsal"]:
        raise ValueError(f"{out} holds a rehearsal, whose times mean nothing: run 'make gpu' on a machine with a GPU")
    texts = {f"{name}.json": report}
    for path in parts:
        if path.stat().st_size:
            texts[f"{name}-{path.stem.removeprefix('bench-')}.json"] = trimmed(read(path))
    if len(texts) == 1:
        raise ValueError(f"expected figures (bench-*.json) in {out}, found none")
    folder.mkdir(exist_ok=True)
    for old in (folder / f"{name}.json", *folder.glob(f"{name}-*.json")):
        old.unlink(missing_ok=True)
    for file, content in texts.items():
        (folder / file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return [folder / file for file in texts]


def trimmed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Of pytest-benchmark's JSON the commit, and every benchmark's own figures."""
    benchmarks = [{"name": b["name"], "extra_info": b["extra_info"]} for b in raw["benchmarks"]]
    return {"commit": raw["machine_info"]["prefixcore"]["commit"], "benchmarks": benchmarks}
