"""Pictures from results: how cost grows, where the targets stand, where a step goes.

Each carries a digest of what it shows. Of several runs, bars with targets show the worst as the tables do; curves and
parts of a step show the median, point by point, since the worst of each would be a curve that nobody measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .cells import REFERENCES, in_order, model, shape
from .runs import FOLDER, Machine, Row
from .targets import over_bare

DIGEST = "prefixcore-digest"
COLOURS = {
    "candidate": "#c1272d",
    "bare": "#444444",
    "bare model": "#444444",
    "concatenated": "#1f77b4",
    "PEFT prefix": "#1f77b4",
    "merged": "#8c8c2a",
}
LABELS = {
    "candidate": "prefixcore",
    "bare": "no prefix (SDPA, or the bare model)",
    "concatenated": "concatenated (PEFT's way, or PEFT)",
    "merged": "merged (two flash calls)",
}
AXES = {
    "T": "T, sequence length",
    "P": "P, virtual tokens",
    "B": "B, rows",
    "N": "N, prefixes in the bank",
    "threads": "threads",
    "layers": "layers (a whole step)",
}


def growth(machine: Machine) -> dict[str, dict[str, list[list[float]]]]:
    """Axis to name to [[value, ms], ...] of the sweeps."""
    series: dict[str, dict[str, list[list[float]]]] = {}
    rows: Sequence[Row] = [*machine.tables.get("attention sweep", ()), *machine.tables.get("layers", ())]
    for row in sorted(rows, key=lambda row: row.case["value"]):
        for name in ("candidate", *row.references):
            lines = series.setdefault(row.case["axis"], {})
            lines.setdefault(name, []).append([row.case["value"], round(1000 * row.middle(name), 4)])
    return series


def ratios(machine: Machine) -> list[dict[str, Any]]:
    """Forward and backward of the shapes with targets: ratios, and the target over SDPA without a prefix."""
    bars = []
    for row in in_order(machine.tables.get("attention", ())):
        if row.case["backward"]:
            target = over_bare(row.case, machine.isa)
            bars.append(
                {
                    "label": f"{shape(row.case)} {row.case['dtype']}",
                    "over": {name: round(row.worst(name), 3) for name in REFERENCES},
                    "target": target.bound if target else None,
                }
            )
    return bars


def profile(machine: Machine) -> dict[str, dict[str, dict[str, float]]]:
    """Step to way of training to part to milliseconds."""
    return {
        ", ".join(model(row.case)): {
            name: {part: round(row.part(name, part), 3) for part in parts}
            for name, parts in row.runs[0]["milliseconds"].items()
        }
        for row in machine.tables.get("profile", ())
    }


def shown(machine: Machine) -> dict[str, Any]:
    """File name to what the picture shows; nothing where nothing was measured."""
    pictures = {f"{machine.slug}-{kind}.png": content(machine) for kind, (content, _) in KINDS.items()}
    return {name: content for name, content in pictures.items() if content}


def kind_of(name: str) -> str:
    """What the picture of that file name shows: one of `KINDS`."""
    return name.removesuffix(".png").rpartition("-")[2]


def digest(content: Any) -> str:
    """Of what a picture shows."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def digest_in(path: Path) -> str | None:
    """The digest that a picture carries."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(DIGEST)


def draw_growth(series: dict[str, dict[str, list[list[float]]]]) -> Any:
    """A plot an axis, a curve an implementation."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    axes_here = [axis for axis in AXES if axis in series]
    columns = min(3, len(axes_here))
    lines = -(-len(axes_here) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * lines), layout="constrained")
    for place, axis in enumerate(axes_here, start=1):
        plot = figure.add_subplot(lines, columns, place)
        for name, points in series[axis].items():
            xs, ys = zip(*points, strict=True)
            plot.plot(xs, ys, marker="o", markersize=3, color=COLOURS[name])
        plot.set_xscale("log", base=2)
        plot.set_yscale("log")
        plot.set_xticks(xs, [f"{x:g}" for x in xs])
        plot.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        plot.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        plot.minorticks_off()
        plot.set_xlabel(AXES[axis])
        plot.set_ylabel("ms")
        plot.grid(alpha=0.3)
    keys = [Line2D([], [], color=COLOURS[name], marker="o", markersize=3, label=LABELS[name]) for name in LABELS]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_ratios(bars: list[dict[str, Any]]) -> Any:
    """Three bars a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.45 * len(bars) + 1), layout="constrained")
    plot = figure.add_subplot()
    for place, bar in enumerate(bars):
        for k, (name, value) in enumerate(bar["over"].items()):
            plot.barh(place + (k - 1) * 0.27, value, height=0.25, color=COLOURS[name], label=LABELS[name])
        if bar["target"] is not None:
            plot.plot([bar["target"]] * 2, [place - 0.4, place - 0.14], color="black", linewidth=2)
    plot.axvline(1, color="black", linewidth=0.8)
    plot.set_yticks(range(len(bars)), [bar["label"] for bar in bars], fontsize=8)
    plot.invert_yaxis()
    mark = "; black mark: the goal over no prefix" if any(bar["target"] for bar in bars) else ""
    plot.set_xlabel(f"our time, forward and backward, over the reference's (1: as fast{mark})")
    handles, labels = plot.get_legend_handles_labels()
    plot.legend(handles[:3], labels[:3], fontsize=8)
    return figure


def draw_profile(steps: dict[str, dict[str, dict[str, float]]]) -> Any:
    """A stacked bar a way of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.7 * len(steps) + 0.6), layout="constrained")
    for place, (step, ways) in enumerate(steps.items(), start=1):
        plot = figure.add_subplot(len(steps), 1, place)
        for line, parts in enumerate(ways.values()):
            left = 0.0
            for k, (part, milliseconds) in enumerate(parts.items()):
                plot.barh(line, milliseconds, left=left, color=f"C{k}", label=part if line == 0 else None)
                left += milliseconds
        plot.set_yticks(range(len(ways)), list(ways), fontsize=8)
        plot.invert_yaxis()
        plot.set_xlabel(f"ms a step ({step})")
    handles, labels = plot.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8, frameon=False)
    return figure


KINDS: dict[str, tuple[Callable[[Machine], Any], Callable[[Any], Any]]] = {
    "growth": (growth, draw_growth),
    "attention": (ratios, draw_ratios),
    "profile": (profile, draw_profile),
}


def draw(machine: Machine, folder: Path = FOLDER) -> list[Path]:
    """Draw what is not there yet as it should be; returns the paths of all pictures."""
    paths = []
    for name, content in shown(machine).items():
        path = folder / name
        paths.append(path)
        if not path.exists() or digest_in(path) != digest(content):
            _, drawn = KINDS[kind_of(name)]
            figure = drawn(content)
            unfinished = path.with_name(f".{path.name}")
            figure.savefig(unfinished, dpi=110, bbox_inches="tight", metadata={DIGEST: digest(content)})
            unfinished.replace(path)
    return paths
