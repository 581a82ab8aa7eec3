"""What happened in a registry: its lock, its log, and what to do after a writer that died in the middle.

In the registry's folder `.prefixcore/`: `lock`, which a writer holds; `pending.json`, what a writer is doing; and
`log.jsonl`, a line for what was done. A writer that dies leaves `pending.json`, and the next one looks whether it had
its effect.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import AdapterError
from .replace import leftovers
from .storage import load_bytes, load_json, write_new

try:
    import fcntl
except ImportError:  # no locks here
    fcntl = None  # type: ignore[assignment]

STATE = ".prefixcore"
PATIENCE = 60.0
"""Seconds that a writer waits for another."""

_LEFT_OVER = re.compile(r"\.(.+)\.(writing|removed)-[0-9a-f]{8}")


@dataclass(frozen=True)
class Replaced:
    """An adapter that is no longer in a registry: its name, its digest and its date, as far as they were known.

    Examples:
        >>> from prefixcore.adapters import Replaced
        >>> Replaced("capitals", None, None).name
        'capitals'
    """

    name: str
    digest: str | None
    date: str | None


@dataclass(frozen=True)
class Event:
    """One change of a registry.

    Attributes:
        time: when, in UTC.
        action: "add", "replace" or "remove".
        name: the entry's.
        digest: of the adapter that is there since; None where it was removed.
        task: of the adapter.
        replaced: those that are no longer there since.

    Examples:
        >>> from prefixcore.adapters import Event
        >>> Event("2026-01-31T12:00:00Z", "add", "capitals", "ab" * 32, "country -> capital").replaced
        []
    """

    time: str
    action: str
    name: str
    digest: str | None
    task: str | None
    replaced: list[Replaced] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: Any) -> Event | None:
        """The inverse of `dataclasses.asdict`; None: it is none."""
        try:
            event = cls(**{**values, "replaced": [Replaced(**each) for each in values["replaced"]]})
        except (TypeError, KeyError):
            return None
        texts = (event.time, event.action, event.name, *(each.name for each in event.replaced))
        return event if all(isinstance(text, str) and "/" not in text for text in texts) else None


class Log:
    """The log of the registry in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._state = directory / STATE
        self._file, self._pending = self._state / "log.jsonl", self._state / "pending.json"

    @contextmanager
    def locked(self, is_done: Callable[[Event], bool], finish: Callable[[Event], None]) -> Iterator[None]:
        """A block that no other writer is in. First what a dead writer has begun is finished, or was never done.

        Args:
            is_done: whether an event has its effect.
            finish: does what is left of an event that has it.

        Raises:
            AdapterError: another writer has the lock for longer than `PATIENCE`, or the file system has no locks.
        """
        if self._state.is_symlink():
            raise AdapterError(f"{self._state}: is a link; expected the registry's own folder")
        self._state.mkdir(exist_ok=True)
        descriptor = os.open(self._state / "lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            self._lock(descriptor)
            if (event := self._begun()) is not None and is_done(event):
                finish(event)
                if event not in self._written()[-1:]:
                    self._append(event)
            self._pending.unlink(missing_ok=True)
            self._clean()
            yield
        finally:
            os.close(descriptor)  # which unlocks it

    def begin(self, event: Event) -> None:
        """Says what is about to be done."""
        data = json.dumps(dataclasses.asdict(event)).encode()
        unfinished = self._pending.with_suffix(".unfinished")
        unfinished.unlink(missing_ok=True)  # of a dead writer
        write_new(unfinished, data)
        unfinished.replace(self._pending)

    def end(self, event: Event) -> None:
        """Says that it is done."""
        self._append(event)
        self._pending.unlink(missing_ok=True)

    def read(self, is_done: Callable[[Event], bool]) -> list[Event]:
        """Every event, the oldest first, also one that is done and not yet written down."""
        events, begun = self._written(), self._begun()
        if begun is not None and begun not in events and is_done(begun):
            events.append(begun)
        return events

    def take_away(self, name: str) -> None:
        """Deletes an entry, which at no moment is there in part."""
        path = self.directory / name
        gone = self.directory / f".{name}.removed-{secrets.token_hex(4)}"
        path.rename(gone)
        if gone.is_symlink() or not gone.is_dir():
            gone.unlink()
        else:
            shutil.rmtree(gone, ignore_errors=True)

    def _written(self) -> list[Event]:
        events = []
        for line in (load_bytes(self._file, 2**30) or b"").splitlines():
            with contextlib.suppress(ValueError, RecursionError):  # a line that a dead writer has not finished
                events.append(Event.from_dict(json.loads(line)))
        return [event for event in events if event is not None]

    def _begun(self) -> Event | None:
        try:
            return Event.from_dict(load_json(self._pending))
        except (AdapterError, OSError):
            return None

    def _append(self, event: Event) -> None:
        found = load_bytes(self._file, 2**30) or b""
        with open(self._file, "ab") as file:
            if found and not found.endswith(b"\n"):
                file.write(b"\n")
            file.write(json.dumps(dataclasses.asdict(event)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _clean(self) -> None:
        """Deletes what dead writers have left."""
        for path in list(self.directory.iterdir()):
            if match := _LEFT_OVER.fullmatch(path.name):
                for folder in leftovers(self.directory / match[1], match[2]):
                    shutil.rmtree(folder, ignore_errors=True)

    def _lock(self, descriptor: int) -> None:
        if fcntl is None:
            raise AdapterError(f"{self.directory}: this system has no file locks, so no registry can be written on it")
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise AdapterError(
                        f"{self.directory}: another process has been writing to it for {PATIENCE:g} seconds; wait for "
                        "it, or end it"
                    ) from None
                time.sleep(0.01)
            except OSError as error:
                raise AdapterError(
                    f"{self.directory}: its file system has no locks ({error.strerror}), so two writers could not be "
                    "told apart; keep the registry on another"
                ) from error
