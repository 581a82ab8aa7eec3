"""How figures are drawn: as SVG, once for a light page and once for a dark one, the same bytes each time."""

from __future__ import annotations

import base64
import re
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass
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


LIGHT = Theme("#1f2328", "#d1d9e0", "#0072b2", "#d55e00", "#6e7781")
DARK = Theme("#f0f6fc", "#3d444d", "#56b4e9", "#e69f00", "#9198a1")
WIDTH = 6.0
"""Inches. A figure keeps its size on a narrow page and is scrolled, so that its text can be read."""


@dataclass(frozen=True)
class Picture:
    """A figure as two images for `src`, and what it shows, for those who do not see it."""

    light: str
    dark: str
    alt: str


def picture(draw: Draw, height: float, alt: str) -> Picture:
    """Draws for a light page; for a dark one the same drawing gets the dark theme's colours."""
    light = _svg(draw, height, LIGHT)
    dark = dict(zip(astuple(LIGHT), astuple(DARK), strict=True))
    # In attributes alone: text is between tags, and base64 has no number sign.
    repainted = re.sub(r"#[0-9a-f]{6}(?=[;\"])", lambda colour: dark.get(colour[0], colour[0]), light)
    return Picture(_uri(light), _uri(repainted), alt)


def _svg(draw: Draw, height: float, theme: Theme) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
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
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # not the reader's own style, which would make another page
        matplotlib.rcParams.update(settings)
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure, theme)
        out = BytesIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return out.getvalue().decode()


def _uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
