"""Processes side by side with a hard time limit, their progress shown while they run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

MARK = "figure: "
"""How a line begins that is shown at once, and not only in the log."""
SILENCE = 20.0  # seconds without such a line, after which the time that has passed is shown
LATE = "stopped: its time was up"


def side_by_side(
    commands: Sequence[Sequence[str]], logs: Sequence[Path], limit: float, settings: Mapping[str, str], folder: Path
) -> list[int | str]:
    """Runs the commands, each with its log; returns the exit statuses, or `LATE` for what was stopped.

    At the limit all that still run are asked to stop, so that pytest writes its reports, and ten seconds later are
    stopped, with all that they started.
    """
    with ExitStack() as files:
        running = [
            subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **settings},
                stdout=files.enter_context(open(log, "w")),
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own: what a command starts is stopped with it
            )
            for command, log in zip(commands, logs, strict=True)
        ]
        return wait_for(running, time.monotonic() + limit, Progress(logs, limit))


class Progress:
    """Shows the marked lines of growing logs, and the time that has passed where there are none."""

    def __init__(self, logs: Sequence[Path], limit: float) -> None:
        self.places = dict.fromkeys(logs, 0)
        self.limit = limit
        self.began = self.spoke = time.monotonic()

    def show(self) -> None:
        for log, place in self.places.items():
            with open(log, "rb") as file:
                file.seek(place)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self.places[log] = place + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                if line.startswith(MARK):
                    self.say(line.removeprefix(MARK))
        if time.monotonic() - self.spoke > SILENCE:
            self.say(f"{time.monotonic() - self.began:.0f} s of at most {self.limit:.0f}")

    def say(self, line: str) -> None:
        self.spoke = time.monotonic()
        print(f"  {line}", flush=True)


def wait_for(
    running: Sequence[subprocess.Popen[bytes]], end: float, progress: Progress | None = None
) -> list[int | str]:
    """The exit statuses, by the time `end`."""

    def all_end(until: float) -> bool:
        while any(process.poll() is None for process in running):
            if time.monotonic() >= until:
                return False
            time.sleep(0.05)
            if progress:
                progress.show()
        return True

    late: list[subprocess.Popen[bytes]] = []
    try:
        all_end(end)
    finally:  # also when this is interrupted
        late = [process for process in running if process.poll() is None]
        for number in (signal.SIGINT, signal.SIGKILL):
            for process in late:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            all_end(time.monotonic() + 10)
    if progress:
        progress.show()
    return [LATE if process in late else process.wait() for process in running]
