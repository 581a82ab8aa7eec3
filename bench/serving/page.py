"""`python -m bench.serving.page`: the table and the picture of README.md from what `bench.serving.load` measured."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import pages

from .load import CLIENTS, HERE, RESULTS

PAGE = HERE / "README.md"
PICTURE = HERE / "results" / "load.svg"
COLOURS = ("#868e96", "#d9480f", "#f08c00", "#3b7dd8", "#1c4f91", "#8c8c2a", "#5c5c1a")


def read(path: Path = RESULTS) -> dict[str, Any]:
    """The figures, as they were kept."""
    return json.loads(path.read_text(encoding="utf-8"))


def table(results: dict[str, Any]) -> str:
    """Each way of asking a row: medians of the rounds, the least and the greatest in brackets."""
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
    stamp = results["stamp"]
    versions = ", ".join(f"{name} {stamp['versions'][name]}" for name in ("vllm", "torch", "transformers", "peft"))
    lines += [
        "",
        f"{stamp['cpu']}, {stamp['cores']} cores; {versions}; {stamp['rounds']} rounds taken in turn, medians (least "
        f"to greatest). An answer has {stamp['tokens_an_answer']} tokens.",
        "",
        f"![The same as curves over the number of clients]({PICTURE.parent.name}/{PICTURE.name})",
    ]
    return "\n".join(lines)


def middle(values: Sequence[float]) -> str:
    """The median, and what lies around it."""
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def draw(results: dict[str, Any], path: Path = PICTURE) -> None:
    """Tokens a second and milliseconds to the first token over the number of clients."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "prefixcore"  # the same figures draw the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    shown = (("tokens_per_second", "tokens a second"), ("first_token_ms", "ms to the first token"))
    for axis, (field, label) in zip(axes, shown, strict=True):
        for way, colour in zip(dict.fromkeys(f["way"] for f in results["figures"]), COLOURS, strict=False):
            of_way = [figure for figure in results["figures"] if figure["way"] == way]
            axis.plot(
                [figure["clients"] for figure in of_way],
                [statistics.median(figure[field]) for figure in of_way],
                marker="o",
                color=colour,
                label=way,
                linestyle="--" if "PEFT" in way else "-",
            )
        axis.set(xscale="log", yscale="log", xlabel="clients", ylabel=label)
        axis.set_xticks(CLIENTS, [str(number) for number in CLIENTS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def right(results: dict[str, Any]) -> str:
    """The page as it should be."""
    return pages.with_parts(pages.read(PAGE), {"load": table(results)}, str(PAGE))


def main() -> int:
    """Render; returns the exit status."""
    results = read()
    PAGE.write_text(right(results), encoding="utf-8")
    draw(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
