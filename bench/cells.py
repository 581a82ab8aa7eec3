"""What the cells of a table are made of: figures with their targets, spreads, shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import targets
from .runs import Row
from .targets import Target

MIB = 2**20
NOTHING = "-"
REFERENCES = {
    "bare": "SDPA without a prefix",
    "concatenated": "concatenated (PEFT's way)",
    "merged": "merged",
}
"""What attention is measured beside, by its name in the results; `docs/method.md` says what each is."""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def judged(figure: float, target: Target | None) -> str:
    """The figure, with its target where it has one; bold where it misses it."""
    if target is None:
        return f"{figure:.2f}"
    return f"{figure:.2f} ({target})" if target.met(figure) else f"**{figure:.2f}** (missed {target})"


def between(spread: tuple[float, float]) -> str:
    """Two bounds."""
    return f"{spread[0]:.2f}..{spread[1]:.2f}"


def milliseconds(seconds: float) -> str:
    """With three significant digits, and no fraction from a second on."""
    value = 1000 * seconds
    return f"{value:.3f}" if value < 1 else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def shape(case: dict[str, Any]) -> str:
    """B,H,Hkv,T,D,P."""
    return ",".join(str(x) for x in targets.shape_of(case))


def passes(case: dict[str, Any]) -> str:
    """What of forward and backward was timed."""
    return "fwd+bwd" if case["backward"] else "fwd"


def model(case: dict[str, Any]) -> list[str]:
    """The model and B,T,P: the first two columns."""
    rows = ", ragged" if case.get("ragged") else ""
    return [case["model"] + rows, f"{case['B']},{case['T']},{case['P']}"]


def dtype(case: dict[str, Any]) -> str:
    """Of a case that does not name it: float32."""
    return case.get("dtype", "fp32")


def over(row: Row, reference: str, target: Target | None = None) -> str:
    """Our time over the reference's, where it was measured."""
    return judged(row.worst(reference), target) if reference in row.references else NOTHING


def spread(row: Row, reference: str) -> str:
    """Between which the rounds lie, where it was measured."""
    return between(row.spread(reference)) if reference in row.references else NOTHING


def skipped(name: Sequence[str], row: Row, columns: int) -> list[str]:
    """The line of a row that was not measured: the reason stands in the first of its columns."""
    return [*name, f"skipped: {row.skipped}", *[NOTHING] * (columns - len(name) - 1)]


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Rows with targets in the order of the targets, whatever order they were measured in."""
    order = targets.ATTENTION

    def place(row: Row) -> tuple[Any, ...]:
        found = targets.shape_of(row.case)
        where = order.index(found) if found in order else len(order)
        return where, row.case.get("dtype") != "fp32", row.case.get("backward", False), str(row.case)

    return sorted(rows, key=place)
