"""Equations become MathML when the site is built: browsers draw it themselves, without a script or a font to fetch."""

from __future__ import annotations

import html
import logging
import re
from typing import Any

from latex2mathml.converter import convert

_log = logging.getLogger("mkdocs.hooks.mathml")
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """mkdocs' event for a page that has become HTML."""

    def mathml(equation: re.Match[str]) -> str:
        tag, tex = equation[1], html.unescape(equation[2]).strip()
        drawn = convert(tex, display="block" if tag == "div" else "inline")
        if unknown := re.search(r"\\[a-zA-Z]+|&(?!#?\w+;)", drawn):  # what the converter passes on as text
            _log.warning("%s: %s is not understood in the equation %s", page.file.src_path, unknown[0], tex)
        return f'<{tag} class="equation">{drawn}</{tag}>'

    return _EQUATION.sub(mathml, content)
