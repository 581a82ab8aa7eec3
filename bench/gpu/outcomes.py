"""What runs of `make gpu` leave in the folder of results, read back: steps, pytest's reports, rows that failed."""

from __future__ import annotations

import json
import shutil
import tarfile
import xml.etree.ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def earlier(out: Path, machine: dict[str, Any], rehearsal: bool) -> list[dict[str, Any]]:
    """The steps that are in `out` already, of this commit on this machine; none where the commit is not known."""
    commit = str(machine.get("commit", "unknown"))
    if commit == "unknown" or commit.endswith("+changes"):
        return []
    try:
        report = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    same = report["machine"] == machine and report["rehearsal"] == rehearsal
    return list(report["steps"]) if same else []


def failed_rows(figures: Path) -> int:
    """How many rows of a part's file failed; 0 where there is no such file."""
    try:
        return len(json.loads(figures.read_text(encoding="utf-8"))["failed"])
    except (OSError, ValueError):
        return 0


def counted(reports: Sequence[Path]) -> dict[str, Any]:
    """What pytest's reports add up to, and why one of its tests was skipped."""
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    failed, reason = [], "every test was skipped"
    for report in reports:
        try:
            suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
        except xml.etree.ElementTree.ParseError:  # its process was killed while it wrote
            continue
        assert suite is not None
        for key in counts:
            counts[key] += int(suite.get(key, 0))
        failed += [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
        reason = next((skipped.get("message", reason) for skipped in suite.iter("skipped")), reason)
    found = {**counts, "reason": reason, **({"failed": failed} if failed else {})}
    return found if counts["tests"] else {}


def packed(out: Path, folder: Path) -> None:
    """All of `out` as one file in `folder`, replaced whole: for a machine of which only a few files come back."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / ".gpu.tar.gz"
    with tarfile.open(unfinished, "w:gz") as archive:
        archive.add(out, arcname="gpu")
    unfinished.replace(folder / "gpu.tar.gz")
    shutil.copy(out / "gpu.json", folder / "gpu.json")
