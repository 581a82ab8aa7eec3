"""Progress of an audit: a bar a step on standard error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Bars, or nothing.

    Args:
        show: whether there are bars; None: on a terminal.
    """

    def __init__(self, show: bool | None = False) -> None:
        self.disable = None if show is None else not show

    def __call__(self, items: Sequence[T], what: str) -> Iterable[T]:
        """The items, one after another, with a bar that says what is done with them."""
        from tqdm.auto import tqdm

        return tqdm(items, desc=what, leave=False, disable=self.disable)
