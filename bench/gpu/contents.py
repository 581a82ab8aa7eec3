"""What the GPU's pictures show: cost over P and over T beside the references, steps beside PEFT and LoRA."""

from __future__ import annotations

from bench.runs import Row

from .kept import Session

BASE = {"B": 8, "H": 32, "Hkv": 8, "D": 128, "backward": True}
AXES = {"P": {"T": 2048}, "T": {"P": 64}}
"""What is varied, and what stands still meanwhile."""


def growth(session: Session) -> dict[str, dict[str, list[list[float]]]]:
    """Axis to name to [[value, ms], ...], forward and backward; an axis with one point alone is left out."""
    series: dict[str, dict[str, list[list[float]]]] = {}
    for axis, fixed in AXES.items():
        rows = [row for row in session.tables.get("gpu attention", ()) if is_of(row, {**BASE, **fixed})]
        for row in sorted(rows, key=lambda row: row.case[axis]) if len(rows) > 1 else ():
            for name in ("candidate", *row.references):
                lines = series.setdefault(axis, {})
                lines.setdefault(name, []).append([row.case[axis], round(1000 * row.middle(name), 4)])
    return series


def is_of(row: Row, case: dict[str, object]) -> bool:
    """Whether the row's case is so, as far as that says."""
    return all(row.case.get(name) == value for name, value in case.items())


def steps(session: Session) -> list[dict[str, object]]:
    """Each way of training over the bare model, of small steps and of large ones without checkpointing."""
    rows = [*session.tables.get("gpu small step", ()), *session.tables.get("gpu step", ())]
    bars: list[dict[str, object]] = []
    for row in rows:
        case = row.case
        if case.get("checkpointing"):
            continue
        names = [name for name in ("PEFT prefix", "LoRA") if name in row.references]
        over = {"candidate": round(row.worst("bare model"), 4)}
        over |= {name: round(row.over(name, "bare model"), 4) for name in names}
        switched = f"\n{case['with']}" if "with" in case else ""
        label = f"{case['model']}\n{case['B']} x {case['T']:,}, P = {case['P']:,}{switched}"
        bars.append({"label": label, "over_bare": over})
    return bars
