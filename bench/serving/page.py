"""`python -m bench.serving.page`: the tables and the pictures of README.md from what `bench.serving.load` measured."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import pages

from .load import CLIENTS, HERE, PEFT_RESULTS, RESULTS

PAGE = HERE / "README.md"
PICTURE = HERE / "results" / "load"
"""The name of the pictures, one for a light page and one for a dark one."""

THEMES = {"light": ("#1f2328", "#d1d9e0"), "dark": ("#f0f6fc", "#3d444d")}
"""Of each, the colour of text and of lines behind; what lies under them is the page's own."""

UNMEASURED = "Not measured yet: `python -m bench.serving.load --peft` does, and this page shows it then."

COLOURS = ("#8b949e", "#d9480f", "#f08c00", "#4493f8", "#8957e5", "#9a8f1f", "#bf4b8a")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
TICKS = {"tokens_per_second": (10, 20, 50, 100, 200), "first_token_ms": (100, 200, 500, 1000, 2000, 5000, 10000, 20000)}


def read(path: Path = RESULTS) -> dict[str, Any]:
    """The figures, as they were kept."""
    return json.loads(path.read_text(encoding="utf-8"))


def table(results: dict[str, Any]) -> str:
    """Each way of asking a row, and the pictures."""
    said = "Tokens a second, and milliseconds to the first token, over the number of clients: the tables as curves"
    where = f"{PICTURE.parent.name}/{PICTURE.name}"
    return "\n".join(
        [
            *_rows(results),
            "",
            f'<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="{where}-dark.svg">\n'
            f'  <img alt="{said}" src="{where}-light.svg">\n</picture>',
        ]
    )


def peft_table(results: dict[str, Any]) -> str:
    """PEFT's own run, round by round; and how much slower many adapters are than one, each round against itself."""
    rounds = results["stamp"]["rounds"]
    heads = " | ".join(f"round {number + 1}" for number in range(rounds))
    lines = [f"| tokens a second | clients | {heads} |", f"| --- | --- |{' --- |' * rounds}"]
    for figure in sorted(results["figures"], key=lambda figure: figure["clients"]):
        cells = " | ".join(f"{value:.1f}" for value in figure["tokens_per_second"])
        lines.append(f"| {figure['way']} | {figure['clients']} | {cells} |")
    lines += ["", _measured_on(results), ""]
    for number, ratios in peft_ratios(results).items():
        lines.append(
            f"- {number} client{'s' if number > 1 else ''}: over many adapters {statistics.median(ratios):.2f} times "
            f"the tokens a second of one ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    return "\n".join(lines)


def peft_ratios(results: dict[str, Any]) -> dict[int, list[float]]:
    """Tokens a second over many adapters by those over one, of each round, by the number of clients."""
    found = {}
    for number in CLIENTS:
        one, many = (f["tokens_per_second"] for f in results["figures"] if f["clients"] == number)
        found[number] = [b / a for a, b in zip(one, many, strict=True)]
    return found


def _rows(results: dict[str, Any]) -> list[str]:
    """Medians of the rounds, the least and the greatest in brackets; and what they were measured on."""
    found = {(figure["way"], figure["clients"]): figure for figure in results["figures"]}
    ways = list(dict.fromkeys(figure["way"] for figure in results["figures"]))
    clients = [f"{number} client{'s' if number > 1 else ''}" for number in CLIENTS]
    lines = [
        f"| tokens a second; ms to the first token | {' | '.join(clients)} |",
        f"| --- |{' --- |' * len(CLIENTS)}",
    ]
    for way in ways:
        cells = (
            f"{middle(found[way, n]['tokens_per_second'])}; {middle(found[way, n]['first_token_ms'])}" for n in CLIENTS
        )
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return [*lines, "", f"{_measured_on(results)} Medians of the rounds (least to greatest)."]


def _measured_on(results: dict[str, Any]) -> str:
    stamp = results["stamp"]
    named = [name for name in ("vllm", "torch", "transformers", "peft") if name in stamp["versions"]]
    versions = ", ".join(f"{name} {stamp['versions'][name]}" for name in named)
    return (
        f"{stamp['cpu']}, {stamp['cores']} cores; {versions}; {stamp['rounds']} rounds taken in turn. An answer has "
        f"{stamp['tokens_an_answer']} tokens."
    )


def middle(values: Sequence[float]) -> str:
    """The median, and what lies around it."""
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def draw(results: dict[str, Any], peft: dict[str, Any] | None, path: Path = PICTURE) -> list[Path]:
    """Tokens a second and milliseconds to the first token over the number of clients; of PEFT alone the ratio.

    Args:
        results: of the one server, and what was asked beside it.
        peft: of the run of PEFT alone; None: it was not measured.
        path: the pictures' name, without their theme.

    Returns:
        The files.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("tokens_per_second", "tokens a second"), ("first_token_ms", "ms to the first token")]
    files = []
    for theme, (ink, line) in THEMES.items():
        colours: Any = {
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink),
            "grid.color": line,
            "svg.hashsalt": "prefixcore",  # the same figures draw the same file
        }
        with matplotlib.rc_context(colours):
            figure, axes = pyplot.subplots(1, len(panels) + (peft is not None), figsize=(11, 4.6), layout="constrained")
            for axis, (field, label) in zip(axes, panels, strict=False):
                _panel(axis, results, field, label)
            if peft is not None:
                _ratio_panel(axes[-1], peft)
            marks, texts = axes[0].get_legend_handles_labels()
            figure.legend(marks, texts, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
            files.append(path.with_name(f"{path.name}-{theme}.svg"))
            figure.savefig(files[-1], metadata={"Date": None}, transparent=True)
            pyplot.close(figure)
    return files


def _panel(axis: Any, results: dict[str, Any], field: str, label: str) -> None:
    ways = list(dict.fromkeys(figure["way"] for figure in results["figures"]))
    values = []
    for way in ways:
        of_way = [figure for figure in results["figures"] if figure["way"] == way]
        medians = [statistics.median(figure[field]) for figure in of_way]
        values += medians
        style = _style(way)
        axis.plot([figure["clients"] for figure in of_way], medians, label=way, markersize=6, alpha=0.9, **style)
    axis.set(xscale="log", yscale="log", xlabel="clients", title=label)
    axis.set_xticks(CLIENTS, [str(number) for number in CLIENTS])
    ticks = [tick for tick in TICKS[field] if min(values) / 1.5 <= tick <= max(values) * 1.5]
    axis.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.grid()


def _ratio_panel(axis: Any, peft: dict[str, Any]) -> None:
    """What many adapters leave of PEFT's tokens a second: a mark a round, and their median."""
    ratios = peft_ratios(peft)
    for number, values in ratios.items():
        axis.plot([number] * len(values), values, linestyle="", marker="P", alpha=0.5, color=COLOURS[-1])
    axis.plot(list(ratios), [statistics.median(values) for values in ratios.values()], "--", color=COLOURS[-1])
    axis.set(xscale="log", yscale="log", xlabel="clients", title="PEFT: 100 adapters / 1 adapter", ylim=(0.03, 2))
    axis.set_xticks(CLIENTS, [str(number) for number in CLIENTS])
    axis.set_yticks((0.05, 0.1, 0.2, 0.5, 1), ("0.05", "0.1", "0.2", "0.5", "1"))
    axis.minorticks_off()
    axis.grid()


def _style(way: str) -> dict[str, Any]:
    """One colour and mark for a way in every panel."""
    order = ("no prompt", "1 adapter", "100 adapters", "text prompt of", "text prompt,", "PEFT, 1 ")
    number = next(i for i in reversed(range(len(order))) if order[i] in way)
    return {"color": COLOURS[number], "marker": MARKERS[number], "linestyle": "--" if "PEFT" in way else "-"}


def right(results: dict[str, Any], peft: dict[str, Any] | None) -> str:
    """The page as it should be."""
    parts = {"load": table(results), "peft": UNMEASURED if peft is None else peft_table(peft)}
    return pages.with_parts(pages.read(PAGE), parts, str(PAGE))


def read_all() -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What was measured with the server, and of PEFT alone, if it was."""
    return read(), read(PEFT_RESULTS) if PEFT_RESULTS.exists() else None


def main() -> int:
    """Render; returns the exit status."""
    results, peft = read_all()
    PAGE.write_text(right(results, peft), encoding="utf-8")
    draw(results, peft)
    return 0


if __name__ == "__main__":
    sys.exit(main())
