"""A part's figures on disk: one JSON file, written whole after every row, so that whatever ends the run leaves them."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench import machine, runs, scale

from . import device
from .processes import MARK

FORMAT = 1
KEYS = {"format", "stamp", "finished", "seconds", "rows", "left_out", "failed"}
LIBRARIES = ("torch", "triton", "transformers", "peft", "flash-attn-4")


def stamp() -> dict[str, Any]:
    """What a reader needs to judge a figure. Names no user, host or folder."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    described = {"device": device.describe(), "real": device.REAL, "scale": scale.SCALE, "versions": versions}
    return {"commit": machine.COMMIT, **described, "switched": device.SWITCHED}


class Figures:
    """The rows of one part.

    What is in the file already, of the same commit on the same device, is kept, and `has` says so: a part that was
    stopped goes on where it was. Of a commit that is not known, or changed since, nothing is kept.

    Args:
        path: the file; None: figures are shown and not kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.began = time.monotonic()
        self.content: dict[str, Any] = {"format": FORMAT, "stamp": stamp(), "finished": False, "seconds": 0.0}
        self.content |= {"rows": [], "left_out": [], "failed": []}
        if path and (before := self._before(path)):
            self.content["rows"] = before["rows"]

    def _before(self, path: Path) -> dict[str, Any] | None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        commit = self.content["stamp"]["commit"]
        known = commit != "unknown" and not commit.endswith("+changes")
        same = known and found.get("format") == FORMAT and found["stamp"] == self.content["stamp"]
        return found if same and not found["finished"] else None

    def has(self, id: str) -> bool:
        """Whether this test's rows were measured before."""
        return any(row["id"] == id for row in self.content["rows"])

    def row(self, id: str, table: str, case: Mapping[str, Any], **facts: Any) -> None:
        """Keeps a row and says what it is."""
        self.content["rows"].append({"id": id, "table": table, "case": dict(case), **runs.rounded(facts)})
        milliseconds = 1e3 * facts["seconds"]["candidate"]["min"]
        beside = ", ".join(f"{x['of_minima']:.2f} of {name}" for name, x in facts["ratios"].items())
        self.say(f"{table}, {', '.join(str(x) for x in case.values())}: {milliseconds:.3g} ms; {beside}")

    def left_out(self, id: str, why: str) -> None:
        """Keeps what was not measured, and why."""
        self.content["left_out"].append({"id": id, "why": why})
        self.say(f"left out: {id}: {why}")

    def failed(self, id: str, why: str) -> None:
        """Keeps what went wrong."""
        self.content["failed"].append({"id": id, "why": why})
        self.say(f"failed: {id}: {why}")

    def finish(self) -> None:
        self.content["finished"] = True
        self.write()

    def say(self, line: str) -> None:
        print(f"\n{MARK}{line}", flush=True)
        self.write()

    def write(self) -> None:
        if self.path is None:
            return
        self.content["seconds"] = round(time.monotonic() - self.began, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{self.path.name}")
        write(self.content, unfinished)
        os.replace(unfinished, self.path)


def write(content: Mapping[str, Any], path: Path) -> None:
    """A row a line, so that later results differ in what differs."""
    lists = ("rows", "left_out", "failed")
    parts = [f"{json.dumps(name)}: {json.dumps(x)}" for name, x in content.items() if name not in lists]
    for name in lists:
        lines = ",\n".join("  " + json.dumps(x) for x in content[name])
        parts.append(f"{json.dumps(name)}: [\n{lines}\n]" if lines else f"{json.dumps(name)}: []")
    path.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """A part's file.

    Raises:
        ValueError: it is not one of this format.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT or set(content) != KEYS:
        raise ValueError(f"{path}: expected a part's figures of format {FORMAT}, as 'make gpu' writes them")
    return content
