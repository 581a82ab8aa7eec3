"""Which columns of data, or fields of JSON, are the prompt and the completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Columns(NamedTuple):
    """What the prompt and the completion are called."""

    prompt: str = "prompt"
    completion: str = "completion"

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Columns:
        """From the settings of a training; a name that is not there is the usual one."""
        names = (settings.get(name) for name in _SETTINGS)
        return cls(*(name if isinstance(name, str) else usual for name, usual in zip(names, USUAL, strict=True)))

    @property
    def settings(self) -> dict[str, str]:
        """Those that are not the usual ones, as settings of a training."""
        named = zip(_SETTINGS, self, USUAL, strict=True)
        return {setting: name for setting, name, usual in named if name != usual}

    def renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row in which the two have their usual names, and no other column has one of these.

        One without a prompt keeps the names that it has, for the message about it.
        """
        if self == USUAL or self.prompt not in row:
            return {name: value for name, value in row.items() if name != USUAL.prompt or name == self.prompt}
        others = {name: value for name, value in row.items() if name not in (*self, *USUAL)}
        return {**others, **{usual: row[name] for usual, name in zip(USUAL, self, strict=True) if name in row}}


USUAL = Columns()

_SETTINGS = ("prompt_column", "completion_column")
