"""Equations become MathML when the site is built.

Browsers draw it themselves, without a script or a font to fetch.
"""

from __future__ import annotations

import html
import logging
import re
from typing import Any

from latex2mathml.converter import convert

_log = logging.getLogger("mkdocs.hooks.mathml")
_EQUATION = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)
_TEX = re.compile(r"\\[a-zA-Z]+|&(?!#?\w+;)")


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """mkdocs' event for a page that has become HTML."""

    def mathml(equation: re.Match[str]) -> str:
        tag, tex = equation[1], html.unescape(equation[2]).strip()
        drawn = convert(tex, display="block" if tag == "div" else "inline")
        if unknown := _TEX.search(drawn):  # the converter passes it on as text
            place = page.file.src_path
            _log.warning("%s: %s is not understood in %s", place, unknown[0], tex)
        return f'<{tag} class="equation">{drawn}</{tag}>'

    return _EQUATION.sub(mathml, content)
