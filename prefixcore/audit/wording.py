"""Numbers and texts as the page writes them."""

from __future__ import annotations

from typing import Any

MOST = 160
"""Characters of a text that are shown."""


def visible(text: Any, most: int = MOST) -> str:
    r"""A text on one line, with what cannot be seen written out, cut where it is long.

    Examples:
        >>> visible("a\nb\u202e")
        'a↵b\\u202e'
    """
    shown = "".join(_character(c) for c in str(text)[: most + 1])
    return shown if len(str(text)) <= most else shown[:most] + " …"


def _character(c: str) -> str:
    if c == "\n":
        return "↵"
    if c == "\t":
        return "⇥"
    return c if c.isprintable() else ascii(c)[1:-1]


def token(text: str) -> str:
    """A token, with spaces at its beginning made visible, and all where there is nothing else."""
    shown = visible(text, 32)
    rest = shown.lstrip(" ")
    return "␣" * (len(shown) - len(rest)) + rest or "(nothing)"


def facts(value: Any) -> str:
    """What a file states, without brackets and quotes.

    Examples:
        >>> facts({"steps": 75, "after training": {"loss": 0.88130455, "examples": 45}})
        'steps 75; after training (loss 0.8813; examples 45)'
    """
    if isinstance(value, dict):
        parts = [(name, each) for name, each in value.items() if each is not None]
        return "; ".join(
            f"{str(name).replace('_', ' ')} " + (f"({facts(each)})" if isinstance(each, (dict, list)) else facts(each))
            for name, each in parts
        )
    if isinstance(value, list):
        return ", ".join(facts(each) for each in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def small(share: float) -> str:
    """A probability as a percentage, with what is too little to write."""
    return f"{100 * share:.2f} %" if share >= 5e-5 else "< 0.01 %"


def percent(share: float) -> str:
    """`0.644` as `64 %`; below one in a hundred with a decimal."""
    value = 100 * share
    return f"{value:.1f} %" if 0 < abs(value) < 1 else f"{value:.0f} %"


def interval(bounds: list[float]) -> str:
    """Two shares as `50 to 77 %`."""
    return f"{100 * bounds[0]:.0f} to {100 * bounds[1]:.0f} %"


def nats(value: float) -> str:
    """Two digits, or three below a tenth."""
    return f"{value:.3f}" if abs(value) < 0.1 else f"{value:.2f}"


def plural(count: int, one: str, many: str | None = None) -> str:
    """`1 probe`, `2 probes`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def p_value(p: float) -> str:
    """`p = 0.031`, or `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def glue(text: str) -> str:
    """A sentence in which no line breaks before a percent sign."""
    return text.replace(" %", "\u00a0%")
