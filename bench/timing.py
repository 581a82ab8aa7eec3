"""Times as ratios: a candidate and its references called in turn in one process.

Whatever else the machine does meanwhile falls on all of them alike, so a ratio is worth more than the two times it is
made of. pytest-benchmark times one callable; the references are timed in its set-up, once before each of its rounds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .scale import MAX_ROUNDS, MIN_ROUNDS, SECONDS

Call = Callable[[], Any]
SHORTEST = 1e-3
"""Seconds: a call quicker than this is repeated until it takes as long, so that the clock itself does not show."""


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Least, quartiles and median of the seconds a call took."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"min": min(seconds), "median": median, "low": low, "high": high}


def ratio(candidate: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Candidate over reference: of the minima, and the median and quartiles of the rounds' own ratios."""
    rounds = [c / r for c, r in zip(candidate, reference, strict=True)]
    low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return {"of_minima": min(candidate) / min(reference), "median": median, "low": low, "high": high}


def seconds_of(call: Call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def repeated(call: Call) -> tuple[Call, int, float]:
    """`call`, repeated often enough to take `SHORTEST`; how often that is; and the seconds all of it takes, about.

    Also warms it up: with one call where that is a long one.
    """
    seconds = seconds_of(call)
    if seconds < 100 * SHORTEST:
        seconds = seconds_of(call)
    times = min(1000, max(1, math.ceil(SHORTEST / max(seconds, 1e-9))))
    if times == 1:
        return call, 1, seconds

    def many() -> None:
        for _ in range(times):
            call()

    return many, times, times * seconds


class Turns:
    """The references of one benchmark: all of them called, and timed, before every round of the candidate."""

    def __init__(self, references: Mapping[str, Call]) -> None:
        prepared = {name: repeated(call) for name, call in references.items()}
        self.calls = {name: call for name, (call, _, _) in prepared.items()}
        self.times = {name: times for name, (_, times, _) in prepared.items()}
        self.round_seconds = sum(seconds for _, _, seconds in prepared.values())
        self.seconds: dict[str, list[float]] = {name: [] for name in references}
        self.turn = 0

    def __call__(self) -> None:
        names = list(self.calls)
        first = self.turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            self.seconds[name].append(seconds_of(self.calls[name]) / self.times[name])
        self.turn += 1


def interleaved(benchmark: Any, candidate: Call, references: Mapping[str, Call]) -> dict[str, Any]:
    """Time `candidate` with pytest-benchmark and `references` in turn with it; all figures go to its `extra_info`.

    Returns:
        `{"rounds", "seconds": {name: summary}, "ratios": {reference: ratio}}` with `"candidate"` among the names
        of `seconds`; without figures under `--benchmark-disable`, where nothing is timed.
    """
    turns = Turns(references)
    once, times, seconds = repeated(candidate)
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(SECONDS / (seconds + turns.round_seconds))))
    benchmark.pedantic(once, setup=turns, rounds=rounds, iterations=1)
    figures: dict[str, Any] = {}
    if benchmark.stats is not None:
        mine = [seconds / times for seconds in benchmark.stats.stats.data]
        # What pytest-benchmark itself prints, saves and compares is of one call too; it divides by `iterations` where
        # there is no set-up.
        benchmark.stats.stats.data[:], benchmark.stats.iterations = mine, times
        figures = {
            "rounds": rounds,
            "seconds": {"candidate": summary(mine), **{name: summary(s) for name, s in turns.seconds.items()}},
            "ratios": {name: ratio(mine, s) for name, s in turns.seconds.items()},
        }
    benchmark.extra_info.update(figures, calls_a_round=times)
    return figures
