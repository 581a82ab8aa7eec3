"""The figures of the page, each from the report's data alone."""

from __future__ import annotations

from typing import Any

from .drawing import Picture, Theme, picture
from .wording import percent, token, visible

MOST_NAMED = 40
"""Virtual tokens that get a label each."""


def figures(data: dict[str, Any]) -> dict[str, Picture]:
    """Every figure that there are data for, by name."""
    found = {"divergence": divergence(data), "promoted": promoted(data)}
    if "not_measured" not in data["attention"]:
        found["heads"] = heads(data["attention"])
        found["tokens"] = tokens(data["attention"])
    if "not_measured" not in data["leave_one_out"]:
        found["without"] = without(data)
    if "not_measured" not in data.get("norms", {"not_measured": ""}):
        found["norms"] = layer_norms(data["norms"])
    if "histogram" in data["nearest"].get("norms", {}):
        found["norms"] = prompt_norms(data["nearest"]["norms"])
    if data["text"]["candidates"]:
        found["texts"] = texts(data["text"])
    return found


def heads(found: dict[str, Any]) -> Picture:
    """The attention on the virtual tokens by layer and head."""

    def draw(figure: Any, theme: Theme) -> None:
        _map(figure, found["by_head"], "head", "share of attention on the virtual tokens", 1.0)

    layers, count = len(found["by_head"]), len(found["by_head"][0])
    alt = (
        f"Heat map of {layers} layers and {count} heads: share of attention on the virtual tokens, mean "
        f"{percent(found['mean'])}, largest {percent(found['largest']['mass'])} in layer {found['largest']['layer']}, "
        f"head {found['largest']['head']}"
    )
    return picture(draw, _map_height(layers), alt)


def tokens(found: dict[str, Any]) -> Picture:
    """The attention on each virtual token by layer."""

    def draw(figure: Any, theme: Theme) -> None:
        _map(figure, found["by_token"], "virtual token", "share of attention, mean of the heads", 0.5)

    layers, count = len(found["by_token"]), len(found["by_token"][0])
    return picture(
        draw, _map_height(layers), f"Heat map of {layers} layers and {count} virtual tokens: attention on each"
    )


def _map_height(layers: int) -> float:
    return min(6.0, max(2.6, 1.2 + 0.13 * layers))


def _map(figure: Any, values: list[list[float]], across: str, meaning: str, power: float) -> None:
    """A heat map whose colours follow a power of the values."""
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes = figure.subplots()
    largest = max(max(row) for row in values)
    norm = PowerNorm(power, vmin=0, vmax=largest or 1)
    image = axes.imshow(values, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest", origin="lower")
    axes.set_xlabel(f"{across} (counted from 0)")
    axes.set_ylabel("layer (counted from 0)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, label=meaning, format=PercentFormatter(1, decimals=0 if largest > 0.1 else 1))
    bar.outline.set_visible(False)


def without(data: dict[str, Any]) -> Picture:
    """The loss without each virtual token."""
    found = data["leave_one_out"]
    changes = [entry["change"] for entry in found["removed"]]
    names = token_names(data)

    def draw(figure: Any, theme: Theme) -> None:
        from matplotlib.ticker import FuncFormatter

        axes = figure.subplots()
        places = range(len(changes))
        axes.bar(places, changes, color=[theme.one if x >= 0 else theme.two for x in changes], width=0.8)
        axes.set_yscale("symlog", linthresh=found["little"], linscale=0.5)
        axes.axhline(0, color=theme.text, linewidth=0.8)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.axhspan(-found["little"], found["little"], color=theme.three, alpha=0.25, linewidth=0)
        axes.set_ylabel("change of the loss\n(nats per token)")
        axes.grid(True, axis="y")
        if len(changes) <= MOST_NAMED:
            axes.set_xticks(list(places), names, rotation=90, fontsize=8)
        axes.set_xlabel("virtual token that is taken out")
        axes.set_xlim(-0.6, len(changes) - 0.4)

    alt = (
        f"Bars: change of the loss without each of {len(changes)} virtual tokens, from {min(changes):.3f} to "
        f"{max(changes):.3f} nats, most for number {found['most_needed']}"
    )
    return picture(draw, 3.2, alt)


def token_names(data: dict[str, Any]) -> list[str]:
    """A label for each virtual token: its number, and the token that it started from or is nearest to."""
    count = data["subject"]["num_virtual_tokens"]
    nearest = data["nearest"]
    texts: list[str] | None = None
    if nearest.get("start"):
        texts = [entry["text"] for entry in nearest["start"]]
    elif "kinds" in nearest:
        kind = nearest["kinds"].get("embedding") or nearest["kinds"]["value"]
        texts = [row[0]["text"] for row in kind["tokens"]]
    if texts is None:
        return [str(i) for i in range(count)]
    return [f"{token(text)[:14]}  {i}" for i, text in enumerate(texts)]


def divergence(data: dict[str, Any]) -> Picture:
    """The divergence at the first answer token of every probe, in its task and elsewhere."""
    sets = [("its task", data["task"]), *((other["name"], other) for other in data["others"])]

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.subplots()
        for line, (_, found) in enumerate(sets):
            values = [row["kl_first"] for row in found["rows"]]
            spread = [line + 0.5 * ((i * 0.618034) % 1 - 0.5) for i in range(len(values))]
            colour = theme.one if line == 0 else theme.two
            axes.plot(values, spread, "o", color=colour, markersize=4, alpha=0.55, markeredgewidth=0)
            middle = sorted(values)[len(values) // 2]
            axes.plot([middle, middle], [line - 0.36, line + 0.36], color=theme.text, linewidth=2)
        axes.set_yticks(range(len(sets)), [visible(name, 24) for name, _ in sets])
        axes.set_ylim(len(sets) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel("KL divergence with against without, first answer token (nats)")
        axes.grid(True, axis="x")

    alt = "Points: divergence of each probe at its first answer token; means: " + ", ".join(
        f"{visible(name, 40)} {found['summary']['kl_first']:.2f}" for name, found in sets
    )
    return picture(draw, 1.3 + 0.55 * len(sets), alt)


def promoted(data: dict[str, Any]) -> Picture:
    """The tokens that become likelier and less likely at the first answer token."""
    found = data["promoted"]["first"]
    up, down = found["promoted"][:10], found["suppressed"][:10]

    def draw(figure: Any, theme: Theme) -> None:
        left, right = figure.subplots(1, 2)
        for axes, rows, colour, title in (
            (left, down, theme.two, "less likely"),
            (right, up, theme.one, "likelier"),
        ):
            axes.barh(range(len(rows)), [row["difference"] for row in rows], color=colour, height=0.7)
            axes.set_yticks(range(len(rows)), [token(row["text"])[:18] for row in rows], fontsize=9)
            axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("mean log-probability,\nwith minus without (nats)")
            axes.grid(True, axis="x")

    alt = "Bars. Likelier with the virtual tokens: " + ", ".join(token(row["text"]) for row in up)
    alt += ". Less likely: " + ", ".join(token(row["text"]) for row in down)
    return picture(draw, 3.2, alt)


def layer_norms(found: dict[str, Any]) -> Picture:
    """A prefix's norms by layer, beside those of text."""

    def draw(figure: Any, theme: Theme) -> None:
        for axes, name in zip(figure.subplots(1, 2), ("key", "value"), strict=True):
            rows = found[name]
            layers = [row["layer"] for row in rows]
            axes.fill_between(
                layers,
                [row["text"]["p5"] for row in rows],
                [row["text"]["p95"] for row in rows],
                color=theme.three,
                alpha=0.35,
                linewidth=0,
                label="tokens of the probes (5 to 95 %)",
            )
            there = [row for row in rows if row["virtual"]]
            middle = [row["virtual"]["median"] for row in there]
            low = [row["virtual"]["least"] for row in there]
            high = [row["virtual"]["greatest"] for row in there]
            places = [row["layer"] for row in there]
            axes.vlines(places, low, high, color=theme.one, linewidth=1.4)
            axes.plot(
                places, middle, "o", color=theme.one, markersize=4, label="virtual tokens (least, median, greatest)"
            )
            axes.set_title(f"{name}s", fontsize=10)
            axes.set_xlabel("layer (counted from 0)")
            axes.set_ylim(bottom=0)
            axes.grid(True, axis="y")
        axes = figure.axes[0]
        axes.set_ylabel("norm")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=1, fontsize=9)

    return picture(draw, 3.4, "Norms of the prefix's keys and values in each layer, beside those of the probes' tokens")


def prompt_norms(found: dict[str, Any]) -> Picture:
    """A soft prompt's norms beside the vocabulary's."""

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.subplots()
        low, high, counts = (found["histogram"][name] for name in ("from", "to", "counts"))
        width = (high - low) / len(counts)
        centres = [low + width * (i + 0.5) for i in range(len(counts))]
        axes.bar(centres, counts, width=width, color=theme.three, alpha=0.6, label="tokens of the vocabulary")
        top = max(counts)
        axes.vlines(found["virtual"], 0, 0.25 * top, color=theme.one, linewidth=1.6, label="virtual tokens")
        axes.set_xlabel("norm of the embedding")
        axes.set_ylabel("tokens")
        axes.set_xlim(left=0)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=2, fontsize=9)

    return picture(draw, 2.8, "Histogram of the vocabulary's norms, with a line for each virtual token")


def texts(found: dict[str, Any]) -> Picture:
    """The share of right answers of each written prompt, beside the adapter's."""
    rows = [("the adapter", found["adapter"]), ("nothing", found["nothing"])]
    rows += [(each["name"], each) for each in sorted(found["candidates"], key=lambda each: -each["share"])]
    rows = rows[:16]

    def draw(figure: Any, theme: Theme) -> None:
        from matplotlib.ticker import PercentFormatter

        axes = figure.subplots()
        shares = [each["share"] for _, each in rows]
        colours = [theme.one, theme.three, *[theme.two] * (len(rows) - 2)]
        axes.barh(range(len(rows)), shares, color=colours, height=0.65)
        errors = [
            [share - each["interval"][0] for share, (_, each) in zip(shares, rows, strict=True)],
            [each["interval"][1] - share for share, (_, each) in zip(shares, rows, strict=True)],
        ]
        axes.errorbar(shares, range(len(rows)), xerr=errors, fmt="none", ecolor=theme.text, elinewidth=0.9, capsize=2)
        axes.set_yticks(range(len(rows)), [visible(name, 44) for name, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel(f"right answers of {found['scored']} (lines: 95 % intervals)")
        axes.grid(True, axis="x")

    alt = "Bars of right answers: " + ", ".join(f"{visible(name, 40)} {percent(each['share'])}" for name, each in rows)
    return picture(draw, 1.0 + 0.27 * len(rows), alt)
