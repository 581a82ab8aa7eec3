"""How figures are drawn: as SVG, once for a light page and once for a dark one, the same bytes each time."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

Draw = Callable[[Any, "Theme"], None]
"""Draws on a matplotlib figure."""


@dataclass(frozen=True)
class Theme:
    """The colours of a page: text, faint lines, and three that colour-blind readers can tell apart."""

    text: str
    faint: str
    one: str
    two: str
    three: str


LIGHT = Theme("#1f2328", "#d1d9e0", "#0072B2", "#D55E00", "#6e7781")
DARK = Theme("#f0f6fc", "#3d444d", "#56B4E9", "#E69F00", "#9198a1")
WIDTH = 7.2
"""Inches. A figure keeps its size on a narrow page and is scrolled, so that its text can be read."""


@dataclass(frozen=True)
class Picture:
    """A figure as two images for `src`, and what it shows, for those who do not see it."""

    light: str
    dark: str
    alt: str


def picture(draw: Draw, height: float, alt: str) -> Picture:
    """Draws in both themes."""
    light, dark = (_uri(_svg(draw, height, theme)) for theme in (LIGHT, DARK))
    return Picture(light, dark, alt)


def _svg(draw: Draw, height: float, theme: Theme) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",  # the reader's own fonts, which have the letters of all tokens
        "svg.hashsalt": "prefixcore",
        "text.parse_math": False,  # a token may hold a dollar sign
        "font.size": 9.5,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.text,
        "text.color": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": theme.faint,
        "grid.linewidth": 0.6,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure, theme)
        out = BytesIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
