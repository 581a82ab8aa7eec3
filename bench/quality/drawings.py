"""The pictures: right answers against trained numbers, and against the time of a training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .intervals import interval, mean
from .methods import METHODS
from .records import Record, chosen

COLOURS = {
    "ours": "#c1272d",
    "ours, from a text": "#e8898c",
    "PEFT": "#1f77b4",
    "LoRA": "#2a8c5a",
    "written": "#8c8c2a",
    "bare": "#444444",
}
LABELS = {
    "ours": "prefixcore",
    "ours, from a text": "prefixcore, from a text",
    "PEFT": "PEFT's prompts",
    "LoRA": "LoRA",
    "written": "written prompt",
    "bare": "bare",
}

Content = dict[str, list[dict[str, Any]]]
"""Task to its points."""


def points(kept: Sequence[Record], task: str, across: Callable[[Record], float]) -> list[dict[str, Any]]:
    """A point a trained method, and the written prompts and the bare model, which have no place across."""
    found = []
    for name, method in METHODS.items():
        if "@" in name or not (mine := chosen(kept, task, name)):
            continue
        if method.attach and not across(mine[0]):
            continue
        rows = tuple(record.right for record in mine)
        low, high = interval(rows)
        found.append(
            {
                "title": method.title,
                "kind": method.kind,
                "across": round(across(mine[0]), 4) if method.attach else None,
                "share": round(mean(rows), 4),
                "low": round(low, 4),
                "high": round(high, 4),
            }
        )
    return found


def contents(kept: Sequence[Record]) -> list[tuple[str, Content, Callable[[Content], Any]]]:
    """(file name, what it shows, how that is drawn) of each picture; none where nothing was run."""
    from .tasks import TASKS

    axes: dict[str, tuple[str, Callable[[Record], float]]] = {
        "quality-numbers.png": ("numbers trained", lambda record: record.numbers),
        "quality-seconds.png": (
            "CPU seconds of the whole training, one thread",
            lambda record: (record.cpu_seconds_a_step or 0.0) * record.steps,
        ),
    }
    made: list[tuple[str, Content, Callable[[Content], Any]]] = []
    for name, (label, across) in axes.items():
        content = {task: found for task in TASKS if (found := points(kept, task, across))}
        if content:
            made.append((name, content, lambda content, label=label: draw(content, label)))  # type: ignore[misc]
    return made


def draw(content: Content, label: str) -> Any:
    """A plot a task; what trains nothing is a line across."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    columns = min(3, len(content))
    lines = -(-len(content) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * lines), layout="constrained")
    for place, (task, found) in enumerate(content.items(), start=1):
        plot = figure.add_subplot(lines, columns, place)
        for point in found:
            colour = COLOURS[point["kind"]]
            if point["across"] is None:
                plot.axhline(100 * point["share"], color=colour, linewidth=0.8, linestyle="--")
                continue
            x, y = point["across"], 100 * point["share"]
            reach = [[max(0.0, y - 100 * point["low"])], [max(0.0, 100 * point["high"] - y)]]
            plot.errorbar([x], [y], yerr=reach, color=colour, marker="o", markersize=4, linewidth=0.8)
            plot.annotate(point["title"], (x, y), xytext=(4, 3), textcoords="offset points", fontsize=6)
        places = [point["across"] for point in found if point["across"] is not None] or [1.0]
        plot.set_xscale("log")
        plot.set_xlim(min(places) / 2, max(places) * 4)  # room for the names
        plot.xaxis.set_major_locator(LogLocator(subs=(1,) if max(places) > 8 * min(places) else (1, 2, 5)))
        plot.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        plot.minorticks_off()
        plot.set_ylim(-3, 103)
        plot.set_title(task, fontsize=9)
        plot.set_xlabel(label, fontsize=8)
        plot.set_ylabel("% right, held out", fontsize=8)
        plot.grid(alpha=0.3)
    kinds = [kind for kind in LABELS if any(p["kind"] == kind for found in content.values() for p in found)]
    keys = [Line2D([], [], color=COLOURS[kind], marker="o", markersize=4, label=LABELS[kind]) for kind in kinds]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=8)
    return figure
