"""The GPU's results on disk: what `make gpu` left of each part, in bench/gpu/results/, under the name of a machine."""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.runs import Row

from . import figures

FOLDER = Path(__file__).parent / "results"


@dataclass
class Session:
    """What is kept of one machine, measured in one run of `make gpu` or in several.

    Attributes:
        name: the file's name in the folder, without `.json`.
        report: what passed, failed and was not run: as `make gpu` writes it, each step with its commit.
        parts: the parts' files by name.
    """

    name: str
    report: dict[str, Any]
    parts: dict[str, dict[str, Any]]

    @property
    def tables(self) -> dict[str, list[Row]]:
        """The rows by the name of their table."""
        return tables(list(self.parts.values()))

    @property
    def title(self) -> str:
        """GPU, CUDA and cuDNN."""
        return str(next(part["stamp"]["device"] for part in self.parts.values()))

    @property
    def device(self) -> str:
        """The GPU alone."""
        return self.title.split(",")[0]

    @property
    def slug(self) -> str:
        """How its pictures' names begin."""
        return self.name

    @property
    def tests(self) -> dict[str, int]:
        """How many device tests there were, and what became of them."""
        return next(step for step in self.report["steps"] if step["step"] == "tests")

    def commit(self, table: str) -> str:
        """What the rows of a table were measured at."""
        found = {p["stamp"]["commit"] for p in self.parts.values() if any(r["table"] == table for r in p["rows"])}
        return ", ".join(sorted(found))


def tables(parts: Sequence[dict[str, Any]]) -> dict[str, list[Row]]:
    """The rows of these parts by the name of their table; of one case the runs are put together."""
    found: dict[str, list[Row]] = {}
    for part in parts:
        for info in part["rows"]:
            rows = found.setdefault(info["table"], [])
            row = next((row for row in rows if row.case == info["case"]), None)
            if row is None:
                rows.append(row := Row(info["case"]))
            row.add(info)
    return found


def read(path: Path) -> dict[str, Any]:
    """The JSON in `path`."""
    return json.loads(path.read_text(encoding="utf-8"))


def sessions(folder: Path = FOLDER) -> list[Session]:
    """What is kept, in the order of the names."""
    names = [path.stem for path in sorted(folder.glob("*.json")) if "steps" in read(path)]
    return [Session(name, read(folder / f"{name}.json"), of(name, folder)) for name in names]


def of(name: str, folder: Path) -> dict[str, dict[str, Any]]:
    """The parts that are kept under a name."""
    paths = sorted(folder.glob(f"{name}-*.json"))
    return {path.stem.removeprefix(f"{name}-"): figures.read(path) for path in paths}


@contextmanager
def unpacked(out: Path) -> Iterator[Path]:
    """The folder of results that `out` is; or that `PACK=` has put into one file, which is `out` or lies there."""
    packed = out if out.is_file() else out / "gpu.tar.gz"
    if not packed.exists():
        yield out
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with tarfile.open(packed) as archive:
                archive.extractall(folder, filter="data")
        except tarfile.TarError as error:
            raise ValueError(f"{packed}: expected the gpu.tar.gz that 'make gpu PACK=' leaves, got {error}") from None
        yield Path(folder) / "gpu"


def keep(out: Path, name: str, folder: Path = FOLDER) -> Sequence[Path]:
    """Write what `make gpu OUT=out` left, or `PACK=out`, into `folder`: parts that are kept by that name and were not
    run stay.

    Raises:
        ValueError: it was a rehearsal, there are no figures, or they are of another GPU than what is kept by the name.
    """
    with unpacked(out) as files:
        report = read(files / "gpu.json")
        found = {path.stem: figures.read(path) for path in sorted(files.glob("*.json")) if path.name != "gpu.json"}
    if report["rehearsal"]:
        raise ValueError(f"{out} holds a rehearsal, whose times mean nothing: run 'make gpu' on a machine with a GPU")
    found = {part: content for part, content in found.items() if content["rows"]}
    if not found:
        raise ValueError(f"expected a part's figures (*.json) in {out}, found none")
    before = of(name, folder)
    devices = {content["stamp"]["device"].split(",")[0] for content in (*found.values(), *before.values())}
    if len(devices) > 1:
        raise ValueError(f"expected figures of one GPU by the name {name!r}, got {', '.join(sorted(devices))}")
    folder.mkdir(exist_ok=True)
    for part, content in found.items():
        figures.write(content, folder / f"{name}-{part}.json")
    kept = read(folder / f"{name}.json")["steps"] if (folder / f"{name}.json").exists() else []
    new = [{**step, "commit": report["machine"]["commit"]} for step in report["steps"]]
    again = {step["step"] for step in new}
    steps = [*new, *(step for step in kept if step["step"] not in again)]
    content = {"machine": report["machine"], "steps": steps}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return [folder / f"{name}.json", *(folder / f"{name}-{part}.json" for part in found)]
