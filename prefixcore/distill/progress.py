"""Bars on standard error for what takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Bars, or nothing.

    Args:
        show: whether there are bars; None: on a terminal.
    """

    def __init__(self, show: bool | None) -> None:
        self._disable = None if show is None else not show

    @contextmanager
    def __call__(self, total: int, what: str) -> Iterator[Callable[[int], object]]:
        """A block with a bar of `total` steps; its value moves the bar on."""
        from tqdm.auto import tqdm

        with tqdm(total=total, desc=what, unit="prompt", disable=self._disable) as bar:
            yield bar.update
