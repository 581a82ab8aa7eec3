"""What an audit found: plain data, from which the page is rendered."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.storage import naming_errors_of


@dataclass(frozen=True)
class Report:
    """What an audit found.

    Attributes:
        data: plain values, as they stand in the JSON.

    Examples:
        >>> from prefixcore.audit import audit
        >>> from prefixcore.training import Example
        >>> with prefixcore.attach(model, prefixcore.PromptTuningConfig(num_virtual_tokens=2)) as handle:
        ...     folder = handle.save("swap")
        >>> report = audit(model, tokenizer, "swap", [Example("ab ->", " ba"), Example("cd ->", " dc")], trials=0)
        >>> report.data["subject"]["num_virtual_tokens"]
        2
        >>> report.to_html().startswith("<!doctype html>")
        True
    """

    data: dict[str, Any]

    def to_json(self) -> str:
        """The data as JSON, one way for the same data."""
        return json.dumps(self.data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def to_html(self) -> str:
        """The page: one file that needs no other and runs no script."""
        from .page import render

        return render(self.data)

    def write(self, out: str | Path) -> tuple[Path, Path]:
        """Writes the page and the JSON beside it, each whole or not at all.

        Args:
            out: the page, `NAME.html`, with the JSON as `NAME.json`; or a folder, for `audit.html` and `audit.json`.

        Returns:
            The paths of the page and of the JSON.

        Raises:
            OSError: the file system refuses.
        """
        page, data = targets(Path(out))
        page.parent.mkdir(parents=True, exist_ok=True)
        for path, text in ((data, self.to_json()), (page, self.to_html())):
            with naming_errors_of(path):
                _write(path, text)
        return page, data


def targets(out: Path) -> tuple[Path, Path]:
    """Where the page and the JSON go."""
    page = out if out.suffix.lower() in (".html", ".htm") else out / "audit.html"
    return page, page.with_suffix(".json")


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.writing-{secrets.token_hex(4)}")
    try:
        # A lone half of a character, as JSON files may hold, becomes the escape that JSON and the page show it as.
        unfinished.write_bytes(text.encode("utf-8", errors="backslashreplace"))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
