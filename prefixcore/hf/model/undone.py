"""What is taken back at the end of a `with` block."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

T = TypeVar("T", bound="UndoneAfterBlock")


class UndoneAfterBlock:
    """A context manager that takes back what it stands for."""

    def _take_back(self) -> None:
        raise NotImplementedError

    def __enter__(self: T) -> T:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._take_back()
