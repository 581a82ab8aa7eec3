"""Pages of which a part is rendered: between two marks stands what the results say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

END = "<!-- end of what is rendered -->"


def begin(name: str) -> str:
    """The mark that a rendered part of that name begins with."""
    return f"<!-- rendered from the results: {name} -->"


def with_parts(text: str, parts: Mapping[str, str], where: str) -> str:
    """The page's text with `parts`, by the names in their marks, in the place of what stands there.

    Raises:
        ValueError: the page lacks a mark.
    """
    for name, part in parts.items():
        before, mark, rest = text.partition(begin(name))
        _, end, after = rest.partition(END)
        if not mark or not end:
            raise ValueError(f"expected the marks {begin(name)!r} and {END!r} in {where}")
        text = f"{before}{mark}\n\n{part}\n\n{end}{after}"
    return text


def anchor(title: str) -> str:
    """What a link to the heading `title` ends with."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def read(page: Path) -> str:
    """The page's text."""
    return page.read_text(encoding="utf-8")
