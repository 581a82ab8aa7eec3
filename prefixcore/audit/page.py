"""The page, from the report's data alone. Everything in it that came from a file is text, never markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import wording
from .figures import figures

TEMPLATE = "page.html.j2"


def render(data: dict[str, Any]) -> str:
    """The page of a report's data."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        visible=wording.visible,
        token=wording.token,
        percent=wording.percent,
        nats=wording.nats,
        interval=wording.interval,
        stated=stated,
        small=wording.small,
        glue=wording.glue,
    )
    return environment.get_template(TEMPLATE).render(d=data, figures=figures(data))


def stated(value: Any) -> str:
    """What an adapter states in a field, on one line; nothing is said so."""
    if value in (None, "", [], {}):
        return "not stated"
    return wording.visible(wording.facts(value), 600)
