"""What is rendered of the GPU: the parts, the goals with what was measured, and each machine's pictures and tables.

`python -m bench.gpu.page FILE.json ...` prints the goals and tables of parts' figures that are not kept.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import pictures, tables
from bench.cells import markdown
from bench.runs import Row

from . import figures, kept, parts
from .goals import GOALS, Goal
from .kept import Session
from .tables import PARTS, TABLES

NOT_YET = "not yet measured"


def parts_table() -> str:
    """The parts of `make gpu`."""
    lines = [[f"`{part.name}`", part.what, str(part.seconds), str(part.limit)] for part in parts.PARTS]
    return markdown(["part", "what it shows", "about, s", "stopped after, s"], lines)


def command(part: str) -> str:
    """What measures a part."""
    return f"`make gpu PARTS={part}`"


def goals_table(found: Sequence[Session]) -> str:
    """Every goal, a column a machine."""
    lines = [
        [goal.what, goal.beside, str(goal.target)]
        + [cell(goal, session.tables, session.commit(goal.table)) for session in found or ()]
        for goal in GOALS
    ]
    return markdown(["what", "over, or of", "goal", *(session.device for session in found)], lines)


def cell(goal: Goal, rows: dict[str, list[Row]], commit: str) -> str:
    """What was measured, whether that meets the goal, and of which commit; or what would measure it."""
    said = []
    for row in rows.get(goal.table, ()):
        figure = goal.figure(row) if goal.of(row) else None
        if figure is not None:
            met = goal.target.met(figure)
            shown = f"{figure:.2f}, met" if met else f"**{figure:.2f}**, missed"
            said.append(f"{shown} ({row.case['with']})" if "with" in row.case else shown)
    return f"{'; '.join(said)}; {commit}" if said else f"{NOT_YET}: {command(goal.part)}"


def stamp_lines(session: Session) -> str:
    """What the machine is, what became of each step, and what was measured of which commit."""
    versions: dict[str, str] = {}
    for part in session.parts.values():
        versions |= part["stamp"]["versions"]
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    groups: dict[str, list[str]] = {}
    for step in session.report["steps"]:
        groups.setdefault(step["commit"], []).append(step_words(step))
    steps = " ".join(f"Commit {commit}: {'; '.join(words)}." for commit, words in groups.items())
    return f"{session.title}; {named}. {steps}"


def step_words(step: dict[str, Any]) -> str:
    """A step, and what became of it."""
    counts = [f"{step[key]} {key}" for key in ("tests", "failures", "errors", "skipped") if key in step]
    more = [*counts, *([step["why"]] if "why" in step else [])]
    return f"{step['step']} {step['state']}" + (f" ({', '.join(more)})" if more else "")


def rendered(found: Sequence[Session]) -> str:
    """All that is said about the kept sessions."""
    said = []
    for session in found:
        shown = [f"![{session.device}: {pictures.kind_of(name)}](results/{name})" for name in pictures.shown(session)]
        stamp = "\n\n".join([stamp_lines(session), *shown])
        said.append(tables.sections(session.device, stamp, session.tables, TABLES, session.device))
        if lines := not_measured(session):
            said += ["#### Not measured", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(said)


def not_measured(session: Session) -> list[str]:
    """The tables that there is nothing for, and what the parts' runs left out or failed at, by the reason."""
    missing = [name for name in TABLES if name not in session.tables]
    lines = [f"{TABLES[name][0]}: {NOT_YET}, {command(PARTS[name])} does" for name in missing]
    reasons: dict[tuple[str, str, str], int] = {}
    for name, part in session.parts.items():
        for how in ("left_out", "failed"):
            for x in part[how]:
                what = x["id"].rpartition(", ")[2] if how == "left_out" else x["id"]
                reason = f"{name}, {what}", how.replace("_", " "), x["why"]
                reasons[reason] = reasons.get(reason, 0) + 1
    times = {reason: f" ({count} rows)" if count > 1 else "" for reason, count in reasons.items()}
    return [*lines, *(f"{what}{times[what, how, why]} {how}: {why}" for what, how, why in reasons)]


def printed(files: Sequence[Path]) -> str:
    """What was measured on, all goals that these files have figures for, and their tables."""
    contents = [figures.read(file) for file in files]
    rows = kept.tables(contents)
    devices = sorted({f"{x['stamp']['device']}; commit {x['stamp']['commit']}" for x in contents})
    judged = [[goal.what, goal.beside, str(goal.target), cell(goal, rows, "here")] for goal in GOALS]
    lines = [line for line in judged if NOT_YET not in line[-1]] if contents[0]["stamp"]["real"] else []
    said = [markdown(["what", "over, or of", "goal", "measured"], lines)] if lines else []
    return "\n\n".join([tables.sections("Figures", "; ".join(devices), rows, TABLES, devices[0]), *said])


if __name__ == "__main__":
    print(printed([Path(file) for file in sys.argv[1:]]))
