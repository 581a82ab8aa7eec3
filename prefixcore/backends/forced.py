"""A choice that is forced: by an environment variable for the whole process, or for a block of code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Forced:
    """What is to be taken, whatever the rules say.

    Attributes:
        name: what is forced; None: nothing. From the environment it is any word, and is checked where it is used.
    """

    def __init__(self, what: str, name: str | None) -> None:
        self.what = what
        self.name = name or None

    @contextmanager
    def within(self, name: str | None, names: Sequence[str]) -> Iterator[None]:
        """A block in which `name` is forced, one of `names`, or None for nothing; ValueError: it is none of them."""
        if name is not None and name not in names:
            raise ValueError(f"unknown {self.what} {name!r}: use one of {names}, or None")
        before, self.name = self.name, name
        try:
            yield
        finally:
            self.name = before
