"""The front page's picture: a step and attention, ours, bare and PEFT's, as SVG for light and for dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from . import targets
from .front import RAGGED, Which, gpu_ratio, gpu_steps, packed, steps_of
from .gpu.kept import Session
from .runs import FOLDER, Machine, Row

NAME = "front"
WIDTH, HEIGHT, LEFT, BAR, GAP, TOP = 880, 196, 74, 22, 8, 84
THEMES = {"light": ("#1f2328", "#59636e"), "dark": ("#f0f6fc", "#9198a1")}  # text, what matters less
BARS = {"prefixcore": "#d9480f", "bare": "#868e96", "PEFT": "#3b7dd8"}
ATTENTION = (2, 8, 8, 1024, 64, 64)
MODEL = "SmolLM2-135M"
GPU_MODEL = "Llama 8B's shape"


class Panel(NamedTuple):
    """Three bars: times, the bare one's being 1."""

    title: str
    detail: str
    times: dict[str, float]


def three(ours_over_bare: float, ours_over_peft: float) -> dict[str, float]:
    """The bars from the two ratios that the tables have."""
    return {"prefixcore": ours_over_bare, "bare": 1.0, "PEFT": ours_over_bare / ours_over_peft}


def panels(found: Sequence[Machine], sessions: Sequence[Session]) -> list[Panel]:
    """What the picture shows: of the first machine, and of the first GPU; what was not measured is left out."""

    def row(table: str, which: Which) -> Row | None:
        rows = found[0].tables.get(table, ()) if found else ()
        return next((row for row in rows if row.runs and which(row)), None)

    shown = []

    def add(title: str, detail: str, row: Row | None, bare: str, peft: str) -> None:
        if row is not None and {bare, peft} <= set(row.references):
            shown.append(Panel(title, detail, three(row.worst(bare), row.worst(peft))))

    def is_attention(row: Row) -> bool:
        return targets.shape_of(row.case) == ATTENTION and row.case["backward"] and row.case["dtype"] == "fp32"

    def is_model(row: Row) -> bool:
        return row.case["model"] == MODEL

    add("Attention, CPU", "2 × 1,024 tokens", row("attention", is_attention), "bare", "concatenated")
    step = row("step", lambda row: is_model(row) and steps_of(1024)(row))
    add("Training step, CPU", f"{MODEL}, 1,024 tokens", step, "bare model", "PEFT prefix")
    ragged = row("packed step", lambda row: is_model(row) and packed(RAGGED)(row))
    add("Ragged texts, packed", f"{MODEL}, 16 to 1,024 tokens", ragged, "bare model", "PEFT prefix")
    for session in sessions[:1]:
        steps = gpu_steps([session]).get(GPU_MODEL, [])
        bare, peft = (gpu_ratio(steps, 64, name) for name in ("bare model", "PEFT prefix"))
        if bare is not None and peft is not None:
            device = session.device.removeprefix("NVIDIA ")
            shown.append(Panel(f"Training step, {device}", f"{GPU_MODEL}, 2 × 2,048", three(bare, peft)))
    return shown


def svg(shown: Sequence[Panel], theme: str, cpu: str = "") -> str:
    """The picture; `cpu`: what its figures were measured on."""
    strong, weak = THEMES[theme]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="-apple-system,BlinkMacSystemFont,Segoe UI,Helvetica,Arial,sans-serif" font-size="13">',
        f"<title>{escape(alt(shown))}</title>",
        text(0, 18, f"Time with 64 virtual tokens; bare, without any, is 1. Shorter is better. {cpu}", weak),
    ]
    pitch = WIDTH / max(1, len(shown))
    longest = max((value for panel in shown for value in panel.times.values()), default=1.0)
    scale = (pitch - LEFT - 52) / longest
    for place, panel in enumerate(shown):
        x = place * pitch
        lines.append(text(x, TOP - 36, panel.title, strong, 'font-size="15" font-weight="600"'))
        lines.append(text(x, TOP - 16, panel.detail, weak, 'font-size="12"'))
        for line, (name, value) in enumerate(panel.times.items()):
            y = TOP + line * (BAR + GAP)
            middle, ours = y + BAR / 2 + 4.5, name == "prefixcore"
            bold = 'font-weight="600"' if ours else ""
            lines.append(text(x, middle, name, strong if ours else weak, bold))
            lines.append(
                f'<rect x="{x + LEFT:.1f}" y="{y}" width="{value * scale:.1f}" height="{BAR}" rx="3" '
                f'fill="{BARS[name]}"/>'
            )
            lines.append(text(x + LEFT + value * scale + 6, middle, f"{value:.2f}", strong if ours else weak, bold))
    return "\n".join([*lines, "</svg>"]) + "\n"


def text(x: float, y: float, said: str, colour: str, more: str = "") -> str:
    """A line of text, its lower left corner at x, y."""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" {more}>{escape(said)}</text>'.replace(" >", ">")


def alt(shown: Sequence[Panel]) -> str:
    """The same in words."""
    return "; ".join(
        f"{panel.title} ({panel.detail}): " + ", ".join(f"{name} {value:.2f}" for name, value in panel.times.items())
        for panel in shown
    )


def pictures(found: Sequence[Machine], sessions: Sequence[Session], folder: Path = FOLDER) -> dict[Path, str]:
    """The files and what is in them."""
    shown = panels(found, sessions)
    cpu = f"CPU: {found[0].name}, {found[0].stamps[0]['threads']} threads." if found else ""
    return {folder / f"{NAME}-{theme}.svg": svg(shown, theme, cpu) for theme in THEMES} if shown else {}


def element(found: Sequence[Machine], sessions: Sequence[Session]) -> str:
    """For the front page: the one or the other, as the reader's page is light or dark."""
    said = escape(alt(panels(found, sessions)), quote=True)
    where = f"bench/{FOLDER.name}/{NAME}"
    return (
        f'<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="{where}-dark.svg">\n'
        f'  <img alt="{said}" src="{where}-light.svg">\n</picture>'
    )
