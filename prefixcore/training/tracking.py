"""What a training run says to the experiment trackers that people use, through accelerate's classes for them."""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")
"""Each needs the package of its name, and accelerate."""

PROJECT = "prefixcore"
"""The project, or the experiment, that runs are put into."""


class TrackerError(ValueError):
    """A tracker cannot be used; the message says how to mend it."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises TrackerError, before any work, if a tracker is not known or what it needs is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise TrackerError(f"no tracker is called {name!r}: one of {', '.join(TRACKERS)}")
        for package in ("accelerate", name):
            if find_spec(package) is None:
                raise TrackerError(f"{name} needs {package}, which is not installed; pip install accelerate {name}")


class Trackers:
    """Open runs of some trackers.

    A tracker that fails while the training runs is given up, and the training goes on: `say` is told once.

    Args:
        names: of `TRACKERS`.
        run: the name of the run.
        settings: of the run: numbers, texts, truth values or None.
        logging_dir: where TensorBoard writes; the others have a place of their own, set by their environment variables.
        say: is told of what goes wrong.

    Raises:
        TrackerError: a tracker is not installed or does not start.
    """

    def __init__(
        self, names: Sequence[str], run: str, settings: Mapping[str, Any], logging_dir: Path, say: Any
    ) -> None:
        check_trackers(names)
        self._say = say
        self._open: dict[str, Any] = {}
        for name in names:
            try:
                with _quietly():
                    self._open[name] = _start(name, run, logging_dir)
                    self._open[name].store_init_configuration(_plain(settings))
            except Exception as error:  # trackers raise what they like
                self.finish()
                raise TrackerError(f"{name} does not start: {_line(error)}") from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by their names (`train/loss`), at an optimizer step."""
        self._each(lambda tracker: tracker.log(dict(values), step=step))

    def finish(self) -> None:
        """Closes the runs."""
        self._each(_finish)
        self._open = {}

    def _each(self, call: Any) -> None:
        for name, tracker in list(self._open.items()):
            try:
                with _quietly():
                    call(tracker)
            except Exception as error:
                del self._open[name]
                self._say(f"warning: {name} failed ({_line(error)}); the training goes on without it")


def _start(name: str, run: str, logging_dir: Path) -> Any:
    from accelerate import tracking

    if name == "tensorboard":
        # Curves of two runs in one folder would be drawn as one.
        place = f"{run}-{time.strftime('%Y%m%d-%H%M%S')}"
        tracker: Any = tracking.TensorBoardTracker(place, logging_dir=str(logging_dir))
    elif name == "mlflow":
        tracker = tracking.MLflowTracker(experiment_name=PROJECT, run_name=run)
    elif name == "wandb":
        tracker = tracking.WandBTracker(PROJECT, name=run)
    else:
        tracker = tracking.TrackioTracker(PROJECT, name=run)
    tracker.start()
    return tracker


def _finish(tracker: Any) -> None:
    if tracker.name == "trackio":
        # accelerate closes the run but leaves it the current one, and trackio closes that again, and says so on
        # standard output, when Python ends.
        import trackio

        trackio.finish()
    else:
        tracker.finish()


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that say nothing, which TensorBoard does not take."""
    return {name: value for name, value in settings.items() if value is not None}


@contextmanager
def _quietly() -> Iterator[None]:
    """A block in which a tracker neither prints nor logs what is no error: standard output has the results alone."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
