"""How pictures are drawn, by matplotlib, from what they show: the same for a CPU's figures and a GPU's."""

from __future__ import annotations

from typing import Any

COLOURS = {
    "candidate": "#c1272d",
    "bare": "#444444",
    "bare model": "#444444",
    "concatenated": "#1f77b4",
    "PEFT prefix": "#1f77b4",
    "merged": "#8c8c2a",
    "LoRA": "#2a8c5a",
    "flex": "#2a8c5a",
    "merged path": "#e08214",
    "short path": "#b35806",
    "single path": "#9970ab",
    "folded path": "#8c8c2a",
    "fa4 path": "#35978f",
}
LABELS = {
    "candidate": "prefixcore",
    "bare": "no prefix (SDPA, or the bare model)",
    "concatenated": "concatenated (PEFT's way, or PEFT)",
    "merged": "merged (two flash calls)",
    "flex": "FlexAttention",
    "PEFT prefix": "PEFT prefix",
    "LoRA": "LoRA, rank 8",
    "merged path": "path merged",
    "single path": "path single",
    "short path": "path short",
    "folded path": "path folded",
    "fa4 path": "path fa4",
}
IN_CURVES = {"bare model": "bare", "PEFT prefix": "concatenated"}
"""What shares a colour and a place in the legend of growth."""
AXES = {
    "T": "T, sequence length",
    "P": "P, virtual tokens",
    "B": "B, rows",
    "N": "N, prefixes in the bank",
    "threads": "threads",
    "layers": "layers (a whole step)",
}


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
    there = {IN_CURVES.get(name, name) for lines in series.values() for name in lines}
    names = [name for name in LABELS if name in there]
    keys = [Line2D([], [], color=COLOURS[name], marker="o", markersize=3, label=LABELS[name]) for name in names]
    figure.legend(handles=keys, loc="outside lower center", ncols=4 if columns > 1 else 2, frameon=False)
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


def draw_steps(bars: list[dict[str, Any]]) -> Any:
    """A group a step, a bar a way of training: its time over the bare model's."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = [name for name in LABELS if any(name in bar["over_bare"] for bar in bars)]
    figure = Figure(figsize=(9, 0.25 * len(bars) * len(names) + 1), layout="constrained")
    plot = figure.add_subplot()
    thick = 0.8 / len(names)
    for place, bar in enumerate(bars):
        for k, name in enumerate(names):
            if name in bar["over_bare"]:
                value, y = bar["over_bare"][name], place + (k - (len(names) - 1) / 2) * thick
                plot.barh(y, value, height=0.9 * thick, color=COLOURS[name])
                plot.text(value, y, f" {value:.2f}", va="center", fontsize=7)
    plot.axvline(1, color=COLOURS["bare model"], linewidth=1)
    plot.set_yticks(range(len(bars)), [bar["label"] for bar in bars], fontsize=8)
    plot.invert_yaxis()
    plot.set_xlabel("a step's time over the bare frozen model's (1: as fast)")
    keys = [Patch(color=COLOURS[name], label=LABELS[name]) for name in names]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)
    return figure
